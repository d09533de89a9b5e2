"""The state machines of runners and requests, as tables."""
