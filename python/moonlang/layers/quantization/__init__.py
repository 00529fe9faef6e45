"""Quantised weights: one file per form. The file's name is the value of --quantization."""
