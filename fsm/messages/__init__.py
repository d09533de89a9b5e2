"""Events in, commands and refusals out, and the log of decisions."""
