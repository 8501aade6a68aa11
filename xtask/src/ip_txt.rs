//! `cargo xtask ip-txt DIRECTORY`: makes `ip.txt` out of published provider ranges.
//!
//! The directory holds files `<provider>-ipv4.txt` and `<provider>-ipv6.txt`, one CIDR a line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;

const HEAD: &str = "\
# ip.txt: prefixes that netmon mutes.
#
# Traffic with a host in one of these prefixes makes no transfer lines; its bytes are summed under the label
# of the section. These are whole clouds: anybody can rent a server in them, so read the muted totals too.
#
# One CIDR a line; `#` begins a comment; `[label]` begins a section. The agent reads the file again when it
# changes; a file with a bad line is refused with the line's number, and the last good one stays in force.
#
# Made by `cargo xtask ip-txt` from the providers' published ranges (Amazon, Google, Microsoft: CC0 lists of
# 2026-08-22; Airtel: routes announced by AS9498), aggregated.
";

/// Writes `out` from the files in `directory`.
pub fn run(directory: &Path, out: &Path) -> Result<()> {
    let mut providers: BTreeMap<String, Vec<IpNet>> = BTreeMap::new();
    for entry in
        std::fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?
    {
        let path = entry?.path();
        let Some(stem) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".txt")) else {
            continue;
        };
        let Some((provider, "ipv4" | "ipv6")) = stem.rsplit_once('-') else { continue };
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let prefixes = providers.entry(provider.to_owned()).or_default();
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
            let prefix: IpNet = line
                .trim()
                .parse()
                .with_context(|| format!("{} line {number}: `{line}` is not a CIDR", path.display()))?;
            prefixes.push(prefix.trunc());
        }
    }
    if providers.is_empty() {
        bail!("{} has no files named <provider>-ipv4.txt or <provider>-ipv6.txt", directory.display());
    }
    let mut text = HEAD.to_owned();
    let mut listed = BTreeSet::new();
    for (provider, prefixes) in providers {
        let before = prefixes.len();
        let aggregated = IpNet::aggregate(&prefixes);
        println!("{provider}: {before} prefixes, {} aggregated", aggregated.len());
        writeln!(text, "\n[{provider}]")?;
        for prefix in aggregated {
            // Two providers may publish one prefix; it needs one label, and the first in the alphabet has it.
            if listed.insert(prefix) {
                writeln!(text, "{prefix}")?;
            }
        }
    }
    std::fs::write(out, text).with_context(|| format!("cannot write {}", out.display()))?;
    println!("{}: {} prefixes", out.display(), listed.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn providers_become_sections_of_aggregated_prefixes() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| directory.path().join(name);
        std::fs::write(file("b-ipv4.txt"), "192.0.2.0/25\n192.0.2.128/25\n").unwrap();
        std::fs::write(file("a-ipv6.txt"), "2001:db8::/32\n2001:db8:1::/48\n").unwrap();
        run(directory.path(), &file("ip.txt")).unwrap();
        let text = std::fs::read_to_string(file("ip.txt")).unwrap();
        assert!(text.ends_with("\n[a]\n2001:db8::/32\n\n[b]\n192.0.2.0/24\n"), "{text}");
    }

    #[test]
    fn the_list_that_ships_is_a_good_list() {
        let list = netmon_common::prefixes::PrefixList::parse(include_str!("../../ip.txt")).unwrap();
        assert_eq!(list.labels(), ["airtel", "amazon", "google", "microsoft"]);
    }
}
