"""Servers with lower tiers in virtual time: host pools of their own, and one store that all of them share."""
