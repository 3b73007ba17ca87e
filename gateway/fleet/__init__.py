"""The replicas that a gateway knows, and which of them gets a call."""
