"""Placement: which device each layer of a model goes to."""
