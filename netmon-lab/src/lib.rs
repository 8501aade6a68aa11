//! A room on one machine: parts that tests use, too.

pub mod udev_inject;
