"""The page at /ui: its files, and what it is told of a server."""
