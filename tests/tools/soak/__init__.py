"""A soak: real threads on a real scheduler, with as many faults at once as possible, for any length of time."""
