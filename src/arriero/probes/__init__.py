"""One question each, with an exit code and an error code."""
