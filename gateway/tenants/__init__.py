"""Authentication, tenants and their quotas."""
