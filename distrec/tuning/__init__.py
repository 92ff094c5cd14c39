"""Sweeps: searches over methods and their settings, and the reports about them."""
