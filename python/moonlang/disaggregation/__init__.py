"""Prefill and decode on different servers: how instances find each other, talk, and move pages of keys and values."""
