"""What computes inside a worker: one interface, one adapter a kind of engine."""
