"""Ten thousand calls in flight."""
