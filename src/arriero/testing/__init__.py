"""Clocks, real clusters, faults, leak checks and conformance suites, offered to adapter authors too."""
