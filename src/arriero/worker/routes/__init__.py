"""The worker's routes, one module a subject."""
