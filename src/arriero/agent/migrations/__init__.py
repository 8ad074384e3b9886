"""The schema of the agent's database, as numbered forward migrations."""
