"""Reading the host and its GPUs."""
