"""Mixtures of experts: which experts a token goes to, and the experts themselves."""
