"""Attention over the paged KV pool. One file per backend, named as `--attention-backend` names it."""
