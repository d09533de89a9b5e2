"""The driver of the core, the executor of its commands, and the broker of requests."""
