"""What becomes of requests and runners: every change of the state, and its commands."""
