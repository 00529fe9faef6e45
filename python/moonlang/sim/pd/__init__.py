"""Worlds of several servers: prefill and decode instances, the network between them, a router, and their troubles."""
