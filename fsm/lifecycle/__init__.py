"""The verbs of requests, runners, loads and device claims: every change of the state, and its commands."""
