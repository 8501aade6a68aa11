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
    head            BLOB NOT NULL,         -- where the chain over the items ends
    connection      INTEGER,               -- number of its live connection; NULL: none
    connected_ns    INTEGER,
    seen_ns         INTEGER,               -- end of its last connection
    record_ns       INTEGER,               -- its newest record, by the PC's clock
    received_ns     INTEGER,               -- the same, by the server's clock
    backlog         INTEGER,               -- as its newest heartbeat says
    next_spki_sha256 BLOB UNIQUE,          -- the key of a renewed certificate that was not used yet
    about           BLOB,                  -- postcard of its newest About
    heard_ns        INTEGER,               -- the newest sign of life, the server's clock
    heartbeat       BLOB,                  -- postcard of its newest Heartbeat
    offset_ns       INTEGER,               -- its clock minus the server's, as last noticed
    missing_ns      INTEGER,               -- since when nothing was heard; NULL: it is heard
    quarantined_ns  INTEGER                -- until when it is not let in
) STRICT;

-- Keys that ended when the one of a renewed certificate was used: who calls with one has a copy of the agent's identity.
CREATE TABLE ended_keys (
    spki_sha256     BLOB PRIMARY KEY,
    agent           INTEGER NOT NULL REFERENCES agents (id)
) STRICT, WITHOUT ROWID;

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

-- A seat's history in order of arrival: n counts events, gaps and notices together.
CREATE TABLE events (
    agent           INTEGER NOT NULL,
    n               INTEGER NOT NULL,
    epoch           INTEGER NOT NULL,
    seq             INTEGER NOT NULL,
    wall_ns         INTEGER NOT NULL,      -- recorded, the PC's clock
    received_ns     INTEGER NOT NULL,      -- received, the server's clock
    link            INTEGER NOT NULL,      -- start of the chain's end with this item
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
    link            INTEGER NOT NULL,
    PRIMARY KEY (agent, n)
) STRICT, WITHOUT ROWID;

-- How many histories an agent began lately is asked with each new one.
CREATE INDEX gaps_begun ON gaps (agent, noticed_ns) WHERE from_seq > to_seq;

-- What the server itself noticed.
CREATE TABLE notices (
    agent           INTEGER NOT NULL,
    n               INTEGER NOT NULL,
    noticed_ns      INTEGER NOT NULL,      -- the server's clock
    notice          BLOB NOT NULL,         -- postcard
    link            INTEGER NOT NULL,
    PRIMARY KEY (agent, n)
) STRICT, WITHOUT ROWID;

-- What the server signed of each history: so many items, and where the chain ended with the last of them.
CREATE TABLE checkpoints (
    agent           INTEGER NOT NULL,
    size            INTEGER NOT NULL,
    head            BLOB NOT NULL,
    signed_ns       INTEGER NOT NULL,
    signature       BLOB NOT NULL,
    PRIMARY KEY (agent, size)
) STRICT, WITHOUT ROWID;

-- One row: until when this server surely ran.
CREATE TABLE server (
    one             INTEGER PRIMARY KEY CHECK (one = 1),
    alive_ns        INTEGER NOT NULL
) STRICT;

-- How far the readable logs were safely on disk: items below next_n are within the first bytes of the files.
CREATE TABLE seat_logs (
    agent           INTEGER PRIMARY KEY REFERENCES agents (id),
    next_n          INTEGER NOT NULL,
    log_bytes       INTEGER NOT NULL,
    usb_bytes       INTEGER NOT NULL
) STRICT;

-- USB devices that say which one they are. Derived from the events, as usb_stays is.
CREATE TABLE usb_devices (
    id              INTEGER PRIMARY KEY,
    vendor_id       INTEGER NOT NULL,
    product_id      INTEGER NOT NULL,
    serial          BLOB NOT NULL,
    vendor          BLOB NOT NULL,         -- names as first seen
    model           BLOB NOT NULL,
    is_shared       INTEGER NOT NULL DEFAULT 0,  -- was at two PCs at once: several devices have this serial number
    UNIQUE (vendor_id, product_id, serial)
) STRICT;

-- Which of them was at which PC. Times are the server's clock.
CREATE TABLE usb_stays (
    device          INTEGER NOT NULL REFERENCES usb_devices (id),
    agent           INTEGER NOT NULL REFERENCES agents (id),
    first_ns        INTEGER NOT NULL,
    last_ns         INTEGER NOT NULL,      -- it came or left
    times           INTEGER NOT NULL,      -- how often it came
    is_there        INTEGER NOT NULL,      -- it came, and nobody said that it left
    PRIMARY KEY (device, agent)
) STRICT, WITHOUT ROWID;

-- An agent that was started names anew what is there.
CREATE INDEX usb_stays_there ON usb_stays (agent) WHERE is_there;
