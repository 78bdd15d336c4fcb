"""Latents measured and kept: statistics of a tokenizer's latents, caches of them, and their checks."""
