-- Times are nanoseconds since 1970-01-01T00:00:00Z. 64-bit numbers without sign (epochs) keep their bits.

CREATE TABLE agents (
    id              INTEGER PRIMARY KEY,
    uuid            BLOB NOT NULL UNIQUE,
    seat            TEXT NOT NULL UNIQUE,
    spki_sha256     BLOB NOT NULL UNIQUE,  -- the allow-list: the key of its certificate
    hostname        BLOB NOT NULL,         -- a label, not an identity
    agent_version   BLOB NOT NULL DEFAULT x'',
    enrolled_ns     INTEGER NOT NULL,
    revoked_ns      INTEGER,
    next_n          INTEGER NOT NULL DEFAULT 1,  -- place of the next item in this seat's history
    connection      INTEGER,               -- number of its live connection; NULL: none
    connected_ns    INTEGER,
    seen_ns         INTEGER,               -- end of its last connection
    record_ns       INTEGER,               -- its newest record, by the PC's clock
    received_ns     INTEGER,               -- the same, by the server's clock
    backlog         INTEGER                -- as its newest heartbeat says
) STRICT;

CREATE TABLE tokens (
    id              BLOB PRIMARY KEY,
    secret_sha256   BLOB NOT NULL,
    created_ns      INTEGER NOT NULL,
    expires_ns      INTEGER NOT NULL,
    uses            INTEGER NOT NULL,
    uses_left       INTEGER NOT NULL CHECK (uses_left >= 0)
) STRICT, WITHOUT ROWID;

-- The watermarks: everything of the epoch below next_seq is in events, or named in gaps. Every epoch that an agent
-- ever said hello for has one.
CREATE TABLE epochs (
    agent           INTEGER NOT NULL REFERENCES agents (id),
    epoch           INTEGER NOT NULL,
    next_seq        INTEGER NOT NULL,
    PRIMARY KEY (agent, epoch)
) STRICT, WITHOUT ROWID;

-- A seat's history in order of arrival: n counts events and gaps together.
CREATE TABLE events (
    agent           INTEGER NOT NULL,
    n               INTEGER NOT NULL,
    epoch           INTEGER NOT NULL,
    seq             INTEGER NOT NULL,
    wall_ns         INTEGER NOT NULL,      -- recorded, the PC's clock
    received_ns     INTEGER NOT NULL,      -- received, the server's clock
    record          BLOB NOT NULL,         -- the bytes as they came
    PRIMARY KEY (agent, n)
) STRICT, WITHOUT ROWID;

-- "Exactly once" does not rest on the code alone.
CREATE UNIQUE INDEX events_once ON events (agent, epoch, seq);

-- from_seq > to_seq: another history begins here, and how much of the one before is missing is unknown.
CREATE TABLE gaps (
    agent           INTEGER NOT NULL,
    n               INTEGER NOT NULL,
    epoch           INTEGER NOT NULL,
    from_seq        INTEGER NOT NULL,
    to_seq          INTEGER NOT NULL,
    since_ns        INTEGER NOT NULL,      -- the newest record before it, the PC's clock
    noticed_ns      INTEGER NOT NULL,      -- the server's clock
    PRIMARY KEY (agent, n)
) STRICT, WITHOUT ROWID;

-- How far the readable logs were safely on disk: items below next_n are within the first bytes of the files.
CREATE TABLE seat_logs (
    agent           INTEGER PRIMARY KEY REFERENCES agents (id),
    next_n          INTEGER NOT NULL,
    log_bytes       INTEGER NOT NULL,
    usb_bytes       INTEGER NOT NULL
) STRICT;
