-- Verified models of this machine; a row is written after its files are whole and in place.
CREATE TABLE models (
    model_id          TEXT PRIMARY KEY,
    model_ref         TEXT NOT NULL UNIQUE,
    provider          TEXT NOT NULL,
    size_bytes        INTEGER NOT NULL,
    sha256            TEXT NOT NULL,
    added_unix        REAL NOT NULL,
    last_used_unix    REAL NOT NULL DEFAULT 0,
    times_used        INTEGER NOT NULL DEFAULT 0,
    is_external       INTEGER NOT NULL,
    architecture      TEXT NOT NULL DEFAULT '',
    quantisation      TEXT NOT NULL DEFAULT '',
    context_length    INTEGER NOT NULL DEFAULT 0,
    block_count       INTEGER NOT NULL DEFAULT 0,
    parameters        INTEGER NOT NULL DEFAULT 0,
    is_embedding      INTEGER NOT NULL DEFAULT 0,
    has_chat_template INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE model_files (
    model_id    TEXT NOT NULL REFERENCES models (model_id) ON DELETE CASCADE,
    -- 0 is the one to load first.
    position    INTEGER NOT NULL,
    name        TEXT NOT NULL,
    path        TEXT NOT NULL,
    size_bytes  INTEGER NOT NULL,
    sha256      TEXT NOT NULL,
    -- When the file was last changed as it was hashed: tells a changed external file.
    modified_ns INTEGER NOT NULL,
    PRIMARY KEY (model_id, position)
) STRICT;
