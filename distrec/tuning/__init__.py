"""Search spaces of the methods."""
