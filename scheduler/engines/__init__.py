"""Engines: what turns a placed model into a running one."""
