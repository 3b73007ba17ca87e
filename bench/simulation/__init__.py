"""A simulated fleet on the product's own code."""
