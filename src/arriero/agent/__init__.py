"""One per machine: fetches models, checks resources, starts, watches and stops workers."""
