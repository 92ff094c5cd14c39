"""Frozen text and image encoders over raw content, to sharded features."""
