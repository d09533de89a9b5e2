"""The errors that users see, and their words."""
