"""The real scheduler under virtual time, with an executor whose KV is a hash chain, seeded workloads and checkers."""
