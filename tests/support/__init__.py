"""What tests share: a harness of the core, models, children, stand-ins."""
