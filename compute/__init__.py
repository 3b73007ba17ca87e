"""The compute service: a dispatcher in which calls wait, and a pool of worker processes that run kernels."""
