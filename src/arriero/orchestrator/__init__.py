"""Decides which node and worker, relays streams: the one public address."""
