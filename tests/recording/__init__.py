"""Recordings, and what is told of them."""
