"""Measurements that a user can make on the machine at hand: `moonlang bench ...`."""
