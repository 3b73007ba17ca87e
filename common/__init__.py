"""Code that gateway, compute and client all need, and nothing that only one of them needs."""
