"""The gateway: an async front door that admits, routes, waits and answers, and never computes."""
