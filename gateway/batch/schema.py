"""The tables of the batch state.

A file is its lines, so that a request is found by its number and nothing is kept twice. A result is one row: that a
(batch, line) has at most one is the primary key's work. Counts are updated in the transaction that adds the row.
"""

from __future__ import annotations

VERSION = 1

SCHEMA = """
CREATE TABLE files (
    id TEXT PRIMARY KEY, filename TEXT NOT NULL, num_bytes INTEGER NOT NULL DEFAULT 0, created_s INTEGER NOT NULL,
    complete INTEGER NOT NULL DEFAULT 0, tenant TEXT NOT NULL DEFAULT ''
);
CREATE TABLE file_lines (
    file_id TEXT NOT NULL REFERENCES files (id), line INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (file_id, line)
);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, idempotency_key TEXT,
    input_file_id TEXT NOT NULL, endpoint TEXT NOT NULL, only_endpoint TEXT NOT NULL, status TEXT NOT NULL,
    total INTEGER NOT NULL, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    created_s INTEGER NOT NULL, window_s INTEGER, completed_s INTEGER, cancelling_s INTEGER, cancelled_s INTEGER,
    expired_s INTEGER, metadata TEXT NOT NULL, has_output INTEGER NOT NULL DEFAULT 1, has_errors INTEGER NOT NULL DEFAULT 1,
    UNIQUE (tenant, idempotency_key)
);
CREATE INDEX batches_by_status ON batches (status);
CREATE INDEX batches_by_file ON batches (input_file_id);
CREATE TABLE results (
    batch_id TEXT NOT NULL REFERENCES batches (id), line INTEGER NOT NULL, ok INTEGER NOT NULL, record BLOB NOT NULL,
    PRIMARY KEY (batch_id, line)
);
CREATE INDEX results_by_kind ON results (batch_id, ok, line);
"""
