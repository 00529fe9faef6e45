"""Grammars that output must follow: one file per --grammar-backend."""
