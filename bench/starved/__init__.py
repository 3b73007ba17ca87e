"""Calls beside programs that take all cores."""
