-- From format 1 to format 2: the chain over each history, notices, checkpoints, presence, renewal.
ALTER TABLE agents ADD COLUMN head BLOB NOT NULL DEFAULT x'';
ALTER TABLE agents ADD COLUMN next_spki_sha256 BLOB;
CREATE UNIQUE INDEX agents_next_key ON agents (next_spki_sha256);
ALTER TABLE agents ADD COLUMN about BLOB;
ALTER TABLE agents ADD COLUMN heard_ns INTEGER;
ALTER TABLE agents ADD COLUMN heartbeat BLOB;
ALTER TABLE agents ADD COLUMN offset_ns INTEGER;
ALTER TABLE agents ADD COLUMN missing_ns INTEGER;
ALTER TABLE agents ADD COLUMN quarantined_ns INTEGER;
ALTER TABLE events ADD COLUMN link INTEGER NOT NULL DEFAULT 0;
ALTER TABLE gaps ADD COLUMN link INTEGER NOT NULL DEFAULT 0;
CREATE INDEX gaps_begun ON gaps (agent, noticed_ns) WHERE from_seq > to_seq;
CREATE TABLE ended_keys (
    spki_sha256     BLOB PRIMARY KEY,
    agent           INTEGER NOT NULL REFERENCES agents (id)
) STRICT, WITHOUT ROWID;
CREATE TABLE notices (
    agent           INTEGER NOT NULL,
    n               INTEGER NOT NULL,
    noticed_ns      INTEGER NOT NULL,
    notice          BLOB NOT NULL,
    link            INTEGER NOT NULL,
    PRIMARY KEY (agent, n)
) STRICT, WITHOUT ROWID;
CREATE TABLE checkpoints (
    agent           INTEGER NOT NULL,
    size            INTEGER NOT NULL,
    head            BLOB NOT NULL,
    signed_ns       INTEGER NOT NULL,
    signature       BLOB NOT NULL,
    PRIMARY KEY (agent, size)
) STRICT, WITHOUT ROWID;
CREATE TABLE server (
    one             INTEGER PRIMARY KEY CHECK (one = 1),
    alive_ns        INTEGER NOT NULL
) STRICT;
