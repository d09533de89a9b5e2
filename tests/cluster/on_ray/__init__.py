"""Real Ray, real processes, real models: `make test-cluster`."""
