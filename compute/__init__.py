"""The compute service: a front that queues calls, and a pool of worker processes that run kernels."""
