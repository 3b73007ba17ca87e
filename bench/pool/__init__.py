"""Figures of the pool: replacement, cancel, order, batches."""
