"""The host and GPUs, real and stand-in."""
