"""Load for minutes while workers or replicas are killed."""
