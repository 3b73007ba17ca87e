"""The servers of the other projects, each in its usual way for CPU-bound functions: two processes run the work.

Each file runs in an environment of its own, which has the project, NumPy and jaxtyping, and not Unlatch.
"""
