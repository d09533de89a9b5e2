"""Plain values: devices, placements, models and their options."""
