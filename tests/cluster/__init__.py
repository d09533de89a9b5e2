"""The choice of a node."""
