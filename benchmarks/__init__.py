"""Benchmarks of fastsam; not part of the installed package."""
