"""The agent's routes, one module a subject."""
