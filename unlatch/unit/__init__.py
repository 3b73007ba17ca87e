"""A unit: a gateway and a replica in one process and on one event loop, joined by method calls."""
