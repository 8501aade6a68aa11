//! Names, programs and people in lines.

use std::fmt::{self, Display, Formatter};

use super::{Quoted, Size};
use crate::model::*;

/// Who had a transfer: `; "chatgpt.com" (TLS), by "firefox" (pid 4711) of "student5" (uid 1005)`, with what moved where there
/// are several.
pub(super) struct Shares<'a>(pub &'a NamedTransfer);

impl Display for Shares<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let NamedTransfer { shares, rest, seated, .. } = self.0;
        let is_listed = shares.len() > 1 || *rest != Traffic::default();
        for share in shares {
            write!(f, "; {}", Who(share))?;
            if is_listed {
                write!(f, ": {}", Both(&share.traffic))?;
            }
        }
        if *rest != Traffic::default() {
            write!(f, "; others: {}", Both(rest))?;
        }
        if let [first, more @ ..] = seated.as_slice() {
            write!(f, "; logged in: {}", Quoted(first))?;
            more.iter().try_for_each(|user| write!(f, ", {}", Quoted(user)))?;
        }
        Ok(())
    }
}

struct Who<'a>(&'a Share);

impl Display for Who<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.0.site {
            Some(site) => write!(f, "{}", Named(site))?,
            None => write!(f, "no name heard")?,
        }
        match &self.0.program {
            Some(program) => write!(f, ", by {}", By(program)),
            None => write!(f, ", by an unknown program"),
        }
    }
}

/// A site with where its name comes from.
struct Named<'a>(&'a Site);

impl Display for Named<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Site { name, source, is_front, age_ms } = self.0;
        let source = match source {
            NameSource::Tls => "TLS",
            NameSource::Quic => "QUIC",
            NameSource::Http => "HTTP",
            NameSource::Dns => "DNS",
        };
        write!(f, "{} ({source}", Quoted(name))?;
        if *age_ms > 0 {
            write!(f, ", {:.1} s before", f64::from(*age_ms) / 1e3)?;
        }
        // What stands behind it is encrypted.
        write!(f, "{})", if *is_front { ", a front" } else { "" })
    }
}

/// A program with its user.
struct By<'a>(&'a Program);

impl Display for By<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Program { name, path, command, pid, uid, user, cgroup, .. } = self.0;
        write!(f, "{} (pid {pid}", Quoted(name))?;
        if !path.is_empty() {
            write!(f, ", {}", Quoted(path))?;
        }
        if !command.is_empty() {
            write!(f, ", command {}", Quoted(command))?;
        }
        if !cgroup.is_empty() {
            write!(f, ", in {}", Quoted(cgroup))?;
        }
        write!(f, ") of ")?;
        if user.is_empty() { write!(f, "uid {uid}") } else { write!(f, "{} (uid {uid})", Quoted(user)) }
    }
}

struct Both<'a>(&'a Traffic);

impl Display for Both<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let t = self.0;
        write!(f, "sent {} ({} B)", Size(t.tx_payload), t.tx_bytes)?;
        write!(f, ", received {} ({} B)", Size(t.rx_payload), t.rx_bytes)
    }
}

pub(super) fn login_sentence(login: &Login) -> String {
    let what = match login.phase {
        LoginPhase::Present => "is logged in",
        LoginPhase::Began => "logged in",
        LoginPhase::Ended => "logged out",
    };
    let mut line =
        format!("{} (uid {}) {what}, session {}", Quoted(&login.user), login.uid, Quoted(&login.session));
    if !login.terminal.is_empty() {
        line += &format!(" at {}", Quoted(&login.terminal));
    }
    if !login.remote.is_empty() {
        line += &format!(" from {}", Quoted(&login.remote));
    }
    line
}

pub(super) fn coverage_sentence(c: &NamesCoverage) -> String {
    let watched = |is: bool, what: &str| {
        if is { what.to_owned() } else { format!("{} ARE NOT WATCHED", what.to_uppercase()) }
    };
    format!(
        "coverage: {}, {}, {}; {} samples; lost: {} samples, {} socket records; not known: names of {} flows, programs of {}",
        watched(c.names, "names"),
        watched(c.programs, "programs"),
        watched(c.logins, "logins"),
        c.samples,
        c.samples_lost,
        c.sockets_lost,
        c.unnamed,
        c.unattributed
    )
}

pub(super) fn neighbour_sentence(neighbour: &Neighbour) -> String {
    let mut line = format!("neighbour {}", neighbour.address);
    if let Some(mac) = neighbour.mac {
        let mac: Vec<_> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        line += &format!(" [{}]", mac.join(":"));
    }
    let source = match neighbour.source {
        NeighbourSource::Table => return line,
        NeighbourSource::Mdns => "mDNS",
        NeighbourSource::Dhcp => "DHCP",
    };
    line + &format!(": {} ({source})", Quoted(&neighbour.name))
}
