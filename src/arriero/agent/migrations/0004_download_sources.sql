-- The machine of the pool that an open download's bytes come from, as people are told of it; empty: none.
ALTER TABLE downloads ADD COLUMN source TEXT NOT NULL DEFAULT '';
