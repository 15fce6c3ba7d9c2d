"""Checkpoint + module = loaded module: what is planned, chosen, filled and proven."""
