"""The kernels that come with Unlatch, one module to a field. Each takes and gives NumPy arrays, nothing else."""
