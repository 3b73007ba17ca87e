"""The servers that the benchmark measures, and their work."""
