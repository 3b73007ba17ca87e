"""Calls as they arrive at a replica: arguments checked, bytes written to the arena."""
