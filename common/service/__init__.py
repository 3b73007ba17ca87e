"""A service's life: start, serve, report health, drain, end."""
