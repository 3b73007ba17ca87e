"""The cores and the memory that the machine and its cgroups grant."""
