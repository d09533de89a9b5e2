"""Everything that a decision depends on."""
