"""Model files, the catalog and the store of measurements."""
