"""The schema of orchestrator.db, one numbered step a file."""
