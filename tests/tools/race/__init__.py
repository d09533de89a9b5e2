"""The race: `make race` sends one sequence of requests through loadmaster and through its peers, in turns."""
