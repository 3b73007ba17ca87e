"""Calls that wait for a worker, and the choice of the next."""
