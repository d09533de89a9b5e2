"""Engines and their child processes."""
