"""Entry points under their SGLang names."""
