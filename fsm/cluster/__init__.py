"""Which node of a cluster serves a request: what nodes tell of themselves, and the choice that fronts make of it."""
