"""Settings: their values, where they come from, and where files are."""
