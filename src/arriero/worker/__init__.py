"""One process, one model: queue, slots, streaming, cancel; owns an engine."""
