"""Which code computes what: one table of operations and their implementations, chosen by facts; see `table`."""
