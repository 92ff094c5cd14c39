"""The Ray cluster that a verb runs on: connecting to it, what it offers, and waiting for it."""
