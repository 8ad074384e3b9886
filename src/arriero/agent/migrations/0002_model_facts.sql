-- Where a model came from, whether it may be pruned, and more of what its header says.
ALTER TABLE models ADD COLUMN format TEXT NOT NULL DEFAULT 'gguf';
ALTER TABLE models ADD COLUMN revision TEXT NOT NULL DEFAULT '';
ALTER TABLE models ADD COLUMN source TEXT NOT NULL DEFAULT '';
ALTER TABLE models ADD COLUMN projector TEXT NOT NULL DEFAULT '';
ALTER TABLE models ADD COLUMN is_pinned INTEGER NOT NULL DEFAULT 0;
ALTER TABLE models ADD COLUMN head_count INTEGER NOT NULL DEFAULT 0;
ALTER TABLE models ADD COLUMN head_count_kv INTEGER NOT NULL DEFAULT 0;
ALTER TABLE models ADD COLUMN embedding_length INTEGER NOT NULL DEFAULT 0;
ALTER TABLE models ADD COLUMN vocabulary_size INTEGER NOT NULL DEFAULT 0;

-- Is a file with this content here already, under whatever reference?
CREATE INDEX model_files_by_content ON model_files (sha256);
