"""Load generators and probes."""
