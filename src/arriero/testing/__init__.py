"""Real clusters, faults, leak checks and conformance suites, also for adapter authors."""
