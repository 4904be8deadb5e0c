"""Whole training steps, side by side."""
