"""Whole steps as CUDA graphs: captured once, replayed with the numbers of each step."""

from fastsam.graph.graph_step import GraphStep, graph_step

__all__ = ["GraphStep", "graph_step"]
