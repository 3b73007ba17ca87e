"""The worker processes of a replica: their slots, runs, memory and ends."""
