"""Eviction: the policies that order candidates, and the selection of a set of victims."""
