"""Model files, the catalogue and the store of measurements."""
