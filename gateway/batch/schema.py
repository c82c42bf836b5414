"""The tables of the batch state.

A file is its lines, so that a request is found by its number and nothing is kept twice. A result is one row: that a
(batch, line) has at most one is the primary key's work. Counts are updated in the transaction that adds the row.
"""

from __future__ import annotations

VERSION = 1

_SCHEMA = """
CREATE TABLE files (
    id TEXT PRIMARY KEY, filename TEXT NOT NULL, num_bytes {integer} NOT NULL DEFAULT 0, created_s {integer} NOT NULL,
    complete INTEGER NOT NULL DEFAULT 0, tenant TEXT NOT NULL DEFAULT ''{rowid}
);
CREATE TABLE file_lines (
    file_id TEXT NOT NULL REFERENCES files (id), line {integer} NOT NULL, data {bytes} NOT NULL, PRIMARY KEY (file_id, line)
);
CREATE TABLE batches (
    number {number}, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, idempotency_key TEXT,
    input_file_id TEXT NOT NULL, endpoint TEXT NOT NULL, only_endpoint TEXT NOT NULL, status TEXT NOT NULL,
    total {integer} NOT NULL, completed {integer} NOT NULL DEFAULT 0, failed {integer} NOT NULL DEFAULT 0,
    created_s {integer} NOT NULL, window_s {integer}, completed_s {integer}, cancelling_s {integer}, cancelled_s {integer},
    expired_s {integer}, metadata TEXT NOT NULL, has_output INTEGER NOT NULL DEFAULT 1, has_errors INTEGER NOT NULL DEFAULT 1,
    UNIQUE (tenant, idempotency_key)
);
CREATE INDEX batches_by_status ON batches (status);
CREATE INDEX batches_by_file ON batches (input_file_id);
CREATE TABLE results (
    batch_id TEXT NOT NULL REFERENCES batches (id), line {integer} NOT NULL, ok INTEGER NOT NULL, record {bytes} NOT NULL,
    PRIMARY KEY (batch_id, line)
);
CREATE INDEX results_by_kind ON results (batch_id, ok, line);
"""

SQLITE = _SCHEMA.format(integer="INTEGER", bytes="BLOB", number="INTEGER PRIMARY KEY AUTOINCREMENT", rowid="")

# `rowid` is what SQLite gives every table: the order in which rows came.
POSTGRES = _SCHEMA.format(
    integer="BIGINT",
    bytes="BYTEA",
    number="BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    rowid=", rowid BIGINT GENERATED ALWAYS AS IDENTITY",
)
