"""The core, told in events."""
