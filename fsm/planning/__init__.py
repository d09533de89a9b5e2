"""Plans: what is done for the request groups that wait."""
