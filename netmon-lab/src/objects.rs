//! What of netmon is in the kernel, and who holds it. Other tests on the machine load the same programs at the same time:
//! theirs are told apart by whose descriptors they are.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::{fs, io};

use serde_json::Value;

/// Numbers of programs and of maps. The kernel counts on and gives no number twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Objects {
    /// Programs.
    pub programs: BTreeSet<u64>,
    /// Maps.
    pub maps: BTreeSet<u64>,
}

impl Objects {
    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.programs.is_empty() && self.maps.is_empty()
    }

    /// Adds others.
    pub fn extend(&mut self, other: Self) {
        self.programs.extend(other.programs);
        self.maps.extend(other.maps);
    }

    /// Those that are also in `other`.
    pub fn common(&self, other: &Self) -> Self {
        let common = |a: &BTreeSet<u64>, b| a.intersection(b).copied().collect();
        Self { programs: common(&self.programs, &other.programs), maps: common(&self.maps, &other.maps) }
    }

    /// Those that are not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        let without = |a: &BTreeSet<u64>, b| a.difference(b).copied().collect();
        Self { programs: without(&self.programs, &other.programs), maps: without(&self.maps, &other.maps) }
    }
}

/// The kernel's lists, as `bpftool` shows them.
#[derive(Debug)]
pub struct Kernel {
    /// Everything that is there.
    pub all: Objects,
    /// Everything that is netmon's by its name, whoever has loaded it.
    pub netmon: Objects,
    /// Maps of each program.
    maps_of: BTreeMap<u64, BTreeSet<u64>>,
    /// Program of each link.
    pub links: BTreeMap<u64, u64>,
}

impl Kernel {
    /// Looks.
    ///
    /// # Errors
    /// `bpftool` is missing, or does not answer.
    pub fn look() -> io::Result<Self> {
        let ids = |list: &[Value], which: fn(&Value) -> bool| {
            list.iter().filter(|item| which(item)).map(|item| id(item, "id")).collect::<io::Result<_>>()
        };
        let every = |list: &[Value]| ids(list, |_| true);
        let named = |list: &[Value]| {
            ids(list, |item| item["name"].as_str().is_some_and(|name| name.starts_with("nm_")))
        };
        let (programs, maps) = (bpftool("prog")?, bpftool("map")?);
        let maps_of = programs.iter().map(|program| {
            let maps = program["map_ids"].as_array().into_iter().flatten();
            Ok((id(program, "id")?, maps.filter_map(Value::as_u64).collect()))
        });
        let links = bpftool("link")?;
        let links = links.iter().map(|link| Ok((id(link, "id")?, id(link, "prog_id")?)));
        Ok(Self {
            all: Objects { programs: every(&programs)?, maps: every(&maps)? },
            netmon: Objects { programs: named(&programs)?, maps: named(&maps)? },
            maps_of: maps_of.collect::<io::Result<_>>()?,
            links: links.collect::<io::Result<_>>()?,
        })
    }

    /// What a process holds: by its descriptors, and the maps of its programs.
    pub fn held_by(&self, pid: u32) -> Objects {
        let mut held = Objects::default();
        // It may end at any time, and descriptors may be closed.
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            for line in text.lines() {
                let number =
                    |name| line.strip_prefix(name).and_then(|rest: &str| rest.trim().parse::<u64>().ok());
                held.programs.extend(number("prog_id:"));
                held.maps.extend(number("map_id:"));
            }
        }
        let maps = held.programs.iter().filter_map(|program| self.maps_of.get(program)).flatten();
        held.maps.extend(maps.copied().collect::<Vec<_>>());
        held
    }

    /// What is netmon's and no living process holds: a pin, an attachment or a leak keeps it.
    ///
    /// # Errors
    /// The processes cannot be listed.
    pub fn orphans(&self) -> io::Result<Objects> {
        let mut held = Objects::default();
        for entry in fs::read_dir("/proc")?.flatten() {
            if let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
                held.extend(self.held_by(pid));
            }
        }
        Ok(self.netmon.without(&held))
    }
}

fn id(item: &Value, name: &str) -> io::Result<u64> {
    item[name].as_u64().ok_or_else(|| io::Error::other(format!("bpftool tells no {name} in {item}")))
}

/// A list; asked again where something has gone while `bpftool` was listing.
fn bpftool(kind: &str) -> io::Result<Vec<Value>> {
    for _ in 0..20 {
        let output = Command::new("bpftool").args(["-j", kind, "list"]).output()?;
        if !output.status.success() {
            continue;
        }
        if let Ok(Value::Array(list)) = serde_json::from_slice(&output.stdout) {
            return Ok(list);
        }
    }
    Err(io::Error::other(format!("bpftool cannot list what the kernel has ({kind})")))
}
