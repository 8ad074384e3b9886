"""What crosses a process boundary: refs, ids, states, requests, events, errors.  Data only."""
