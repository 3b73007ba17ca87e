"""Metrics, logs and traces that every process writes."""
