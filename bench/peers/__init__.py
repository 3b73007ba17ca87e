"""Unlatch beside other servers of Python functions: the same work, the same bytes, the same load."""
