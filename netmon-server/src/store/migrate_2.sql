-- From format 2 to format 3: which USB device was at which PC.
CREATE TABLE usb_devices (
    id              INTEGER PRIMARY KEY,
    vendor_id       INTEGER NOT NULL,
    product_id      INTEGER NOT NULL,
    serial          BLOB NOT NULL,
    vendor          BLOB NOT NULL,
    model           BLOB NOT NULL,
    is_shared       INTEGER NOT NULL DEFAULT 0,
    UNIQUE (vendor_id, product_id, serial)
) STRICT;
CREATE TABLE usb_stays (
    device          INTEGER NOT NULL REFERENCES usb_devices (id),
    agent           INTEGER NOT NULL REFERENCES agents (id),
    first_ns        INTEGER NOT NULL,
    last_ns         INTEGER NOT NULL,
    times           INTEGER NOT NULL,
    is_there        INTEGER NOT NULL,
    PRIMARY KEY (device, agent)
) STRICT, WITHOUT ROWID;
CREATE INDEX usb_stays_there ON usb_stays (agent) WHERE is_there;
