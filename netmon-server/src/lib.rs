//! netmon's server: collects what the agents of a room record, and keeps a log of each PC.
//!
//! Pure modules decide: [`ingest`] (order, duplicates, gaps), [`tokens`] (who may enrol), [`seat`] (labels),
//! [`lanes`] (whose work is next),
//! [`render`] (stored item → log line), [`ca`] (certificates). Thin shells do the I/O: [`collector`] and
//! [`enrollment`] (QUIC), [`store`] (SQLite), [`writer`] (the one thread that writes it), [`seatlogs`] (the
//! readable log files), [`serve`] and [`commands`] (the command line).

mod admission;
pub mod ca;
pub mod chain;
pub mod cli;
pub mod clock;
pub mod clones;
pub mod collector;
pub mod commands;
pub mod conversation;
pub mod datadir;
pub mod enrollment;
mod frames;
pub mod ingest;
pub mod lanes;
pub mod limits;
pub mod notice;
pub mod passport;
pub mod presence;
pub mod render;
pub mod seat;
pub mod seatlogs;
pub mod serve;
pub mod signing;
pub mod store;
pub mod supervisor;
mod tls;
pub mod tokens;
pub mod verification;
pub mod writer;
