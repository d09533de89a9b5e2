"""Model checker, simulation and auditor: proof tools, imported by the command `explore` alone."""
