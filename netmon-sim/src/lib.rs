//! Delivery, simulated: agents' spools and sessions against the server's ingest, and their disks, in one process.

pub mod disk;
pub mod vfs;
