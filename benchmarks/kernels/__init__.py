"""The bandwidth of the kernels on a GPU."""
