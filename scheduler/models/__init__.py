"""Model files: where they are found, what is read from them, what was measured."""
