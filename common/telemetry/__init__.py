"""Metrics, logs and traces of every process."""
