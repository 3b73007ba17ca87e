"""gRPC servers and statuses, addresses, and settings from flags and the environment."""
