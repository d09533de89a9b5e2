"""Threads, latches and the clock."""
