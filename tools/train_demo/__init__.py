"""Trains the demo model: grammar, tokenizer, network, export and reference tokens."""
