"""Calls as they arrive at a replica: arguments checked, poison refused."""
