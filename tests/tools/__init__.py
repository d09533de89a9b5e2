"""Programs that measure and report, and tests of these programs."""
