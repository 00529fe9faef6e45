"""Mailboxes between processes (`core.ports.Endpoint`): one file per backend, one codec, one fault wrapper."""
