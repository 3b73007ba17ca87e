"""Cores and memory that the machine and its cgroups grant."""
