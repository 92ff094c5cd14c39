"""Parity with the published programs: compares their recorded numbers with the project's own engine."""
