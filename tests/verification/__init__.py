"""The model checker, the simulation, and the faults that they have to find."""
