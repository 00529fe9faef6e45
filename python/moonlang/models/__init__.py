"""One file per architecture: the module, its weights map and a tiny configuration for tests."""
