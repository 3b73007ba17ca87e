"""TLS and certificates, and files that are read again when they change."""
