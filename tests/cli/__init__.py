"""The command `loadmaster`."""
