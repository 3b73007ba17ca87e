"""The compute service: a dispatcher that takes calls in, and a pool of worker processes that run kernels."""
