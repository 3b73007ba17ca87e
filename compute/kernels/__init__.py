"""The kernels that come with Unlatch, one module for each field. Each takes and returns NumPy arrays only."""
