"""Recordings of decisions, and their replay."""
