"""A soak: real threads on a real scheduler, with every fault that can be had at once, for as long as one likes."""
