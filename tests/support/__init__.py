"""What tests share: a harness of the core, models, child processes, stand-ins."""
