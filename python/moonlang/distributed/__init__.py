"""Ranks that compute one model together: who they are, and how numbers go from one to all."""
