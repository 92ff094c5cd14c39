"""Parity with the published programs: their recorded numbers against the project's own engine."""
