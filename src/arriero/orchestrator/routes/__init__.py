"""The orchestrator's routes, one module a subject."""
