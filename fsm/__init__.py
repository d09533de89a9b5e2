"""The decision core: state machines, placement and eviction, as pure functions of events and time."""
