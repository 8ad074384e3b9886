"""Tools of a process: clock, tasks, subprocesses, HTTP, SSE, settings, logs.  Knows nothing of models."""
