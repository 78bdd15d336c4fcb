"""Weights on disk: our own format, and the official MAR checkpoints both ways."""
