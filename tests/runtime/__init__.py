"""The driver, the executor and the broker."""
