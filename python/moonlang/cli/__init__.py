"""The command `moonlang`."""
