"""Programs that measure and report, and their own tests."""
