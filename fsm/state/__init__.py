"""The state of the core: everything that a decision depends on."""
