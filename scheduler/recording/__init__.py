"""Recording decisions, and telling them again."""
