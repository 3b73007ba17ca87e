"""`make bench`: Unlatch beside what it replaces, in one run, loaded by one generator with the same bytes."""
