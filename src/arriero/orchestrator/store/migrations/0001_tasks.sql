CREATE TABLE tasks (
    task_id TEXT PRIMARY KEY,
    created_unix REAL NOT NULL,
    -- NULL while the task is open.
    finished_unix REAL,
    -- 1: somebody reads its events as they come, and the task ends with that connection.
    is_owned INTEGER NOT NULL,
    request_id TEXT NOT NULL,
    idempotency_key TEXT,
    -- The request as it came, JSON; and what tells whether another request is the same one.
    body BLOB NOT NULL,
    body_sha256 TEXT NOT NULL,
    -- How often it was begun: 2 after the first restart.
    run INTEGER NOT NULL DEFAULT 1,
    -- The record as `GET /v1/tasks/ID` shows it, JSON.
    record BLOB NOT NULL
) STRICT;

CREATE INDEX tasks_open ON tasks (created_unix) WHERE finished_unix IS NULL;
CREATE INDEX tasks_finished ON tasks (finished_unix) WHERE finished_unix IS NOT NULL;
-- A key may come again after its task was cancelled: the newest one counts.
CREATE INDEX tasks_by_key ON tasks (idempotency_key, created_unix) WHERE idempotency_key IS NOT NULL;
