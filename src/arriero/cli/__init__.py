"""The person's hand: parse, call the HTTP API, print."""
