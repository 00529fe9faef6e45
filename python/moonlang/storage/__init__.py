"""HiCache's third tier: page stores shared by all instances of a model. A backend is a file; see `channel`."""
