"""Engines, which load placed models and run them."""
