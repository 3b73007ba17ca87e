"""A kernel as plain data, and the arrays that it takes and returns."""
