"""What must not get worse: compiled kernels, launches, the time and traffic of the CPU, and a GPU record."""
