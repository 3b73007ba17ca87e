"""Every built-in kernel, measured beside other libraries."""
