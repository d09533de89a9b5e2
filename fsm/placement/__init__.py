"""Which device each layer goes to."""
