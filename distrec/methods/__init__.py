"""The method contract and one module per method."""
