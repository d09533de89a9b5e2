"""What a program embeds, with real threads."""
