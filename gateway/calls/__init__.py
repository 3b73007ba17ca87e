"""A call's life in the gateway, from admission to answer."""
