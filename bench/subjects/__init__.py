"""The servers that the benchmark measures, and the work that they do."""
