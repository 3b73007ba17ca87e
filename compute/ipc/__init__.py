"""The dispatcher and its workers share these: frames, the arena, memory limits."""
