"""What is timed: every method, the eager baselines, other packages, the tasks and lists of parameters."""
