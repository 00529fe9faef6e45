"""The executor: plans in, results out. Slots, layout, sampling, sizing of the KV pool, and the threads that run it."""
