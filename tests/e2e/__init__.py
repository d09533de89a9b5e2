"""Real engines, real files, real faults."""
