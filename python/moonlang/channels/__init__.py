"""What channels (see `core.ports`) are made of: tickets, a worker thread."""
