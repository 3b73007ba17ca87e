"""Figures of a gateway with several replicas."""
