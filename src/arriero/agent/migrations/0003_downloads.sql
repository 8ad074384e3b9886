-- Downloads that somebody waits for: what an agent that was killed left open, and the next one goes on with.
CREATE TABLE downloads (
    download_id  TEXT PRIMARY KEY,
    model_ref    TEXT NOT NULL UNIQUE,
    started_unix REAL NOT NULL,
    is_clean     INTEGER NOT NULL
) STRICT;
