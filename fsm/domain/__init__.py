"""Plain values: models, options and devices."""
