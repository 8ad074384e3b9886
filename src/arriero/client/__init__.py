"""The typed client: the only way in for CLI, probes and tests."""
