"""Code of the worker process, and of the forkserver before it."""
