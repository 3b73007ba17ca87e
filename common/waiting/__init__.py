"""Which call runs next, how long calls run, and which calls can finish in time."""
