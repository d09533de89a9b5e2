"""The settings, their values and sources, and the paths of shared files."""
