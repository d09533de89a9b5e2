"""The model checker, the simulation, and the mutants of the core that they have to find."""
