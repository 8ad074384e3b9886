"""Decisions as pure code: no I/O, no clock, no chance; time and chance come in with the event."""
