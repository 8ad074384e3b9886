CREATE TABLE nodes (
    name TEXT PRIMARY KEY,
    -- What `nodes add` was told and what the machine last said of itself, JSON.
    entry BLOB NOT NULL
) STRICT;

-- One row: who this orchestrator is to the agents, and the first fencing number not handed out yet.
CREATE TABLE holder (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    holder_id TEXT NOT NULL,
    next_lease INTEGER NOT NULL
) STRICT;
