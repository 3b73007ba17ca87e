"""`make bench`: Unlatch compared with what it replaces, in one run, with the same load generator and the same bytes."""
