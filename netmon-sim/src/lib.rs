//! Delivery, simulated: agents' spools and sessions against the server's ingest and store, in one process, without
//! threads, clock, network or disk. Everything that happens is drawn from one seed, so that a seed that fails does so
//! again. docs/simulation.md says what is simulated and what is checked.
//!
//! * [`agent`], [`server`]: the real code, and the little that is between its parts
//! * [`machine`], [`disk`], [`vfs`]: what they keep their files on
//! * [`world`]: network, faults, chance
//! * [`ledger`], [`oracle`]: what was promised, and whether it was kept
//! * [`mutants`]: mistakes that must be found

pub mod agent;
pub mod disk;
pub mod ledger;
pub mod machine;
pub mod mutants;
pub mod oracle;
pub mod server;
pub mod tally;
pub mod vfs;
pub mod world;
