//! Follows the PC's interfaces and addresses (rtnetlink).
//!
//! A notification only says *that* something changed: the whole list is then read anew, so that a lost
//! notification can never leave a wrong picture for long ([`RESYNC`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt};
use globset::{Glob, GlobSet, GlobSetBuilder};
use ipnet::IpNet;
use netmon_common::raw::Raw;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::LinkAttribute;
use tokio::sync::mpsc;

/// The list is read at least this often, whatever the notifications say.
pub const RESYNC: Duration = Duration::from_secs(30);
/// Notifications come in bursts; the list is read once they pause this long, well within the second that a new
/// interface may take.
const SETTLE: Duration = Duration::from_millis(20);
/// Longest wait for that pause: chatter about one interface must not hold off another.
const SETTLE_AT_MOST: Duration = Duration::from_millis(200);

/// One interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Kernel's index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// True when a bus device stands behind it: not a bridge, bond, VLAN, veth or tunnel on top of others.
    pub device: bool,
    /// Its prefixes: whoever is in them can be reached without a router.
    pub on_link: Vec<IpNet>,
}

/// Why interfaces cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    /// No netlink socket.
    #[error("cannot open a netlink socket to follow the interfaces")]
    Open(#[source] std::io::Error),
    /// The kernel did not list them.
    #[error("the kernel did not list the interfaces")]
    List(#[source] rtnetlink::Error),
}

/// The interfaces of this network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// By index.
    pub links: Vec<Link>,
    /// Names of interfaces that cannot be listed and therefore not be watched: netlink's reader takes no name that
    /// is not UTF-8.
    pub hidden: Vec<Raw>,
}

/// Lists the interfaces of this network namespace by index.
///
/// # Errors
/// [`LinksError`] when netlink does not answer.
pub async fn list() -> Result<Vec<Link>, LinksError> {
    Ok(list_all().await?.links)
}

/// [`list`], with the names of those that cannot be listed.
///
/// # Errors
/// As there.
pub async fn list_all() -> Result<Listing, LinksError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(LinksError::Open)?;
    let connection = tokio::spawn(connection);
    let listing = list_with(&handle).await;
    connection.abort();
    listing
}

/// Sends the list now and whenever it changes, until the receiver is dropped.
///
/// # Errors
/// [`LinksError`] when the notifications cannot be subscribed to or a listing fails; the caller starts again.
pub async fn follow(changes: mpsc::Sender<Vec<Link>>) -> Result<(), LinksError> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, handle, mut messages) =
        rtnetlink::new_multicast_connection(&groups).map_err(LinksError::Open)?;
    let connection = tokio::spawn(connection);
    let mut known = None;
    let mut said = BTreeSet::new();
    loop {
        let Listing { links, hidden } = list_with(&handle).await?;
        said.retain(|name| hidden.contains(name));
        for name in hidden {
            if said.insert(name.clone()) {
                tracing::warn!(
                    interface = %name.escaped(),
                    "an interface CANNOT BE WATCHED because its name is not UTF-8: rename it (ip link set dev OLD name NEW)"
                );
            }
        }
        if known.as_ref() != Some(&links) {
            known = Some(links.clone());
            if changes.send(links).await.is_err() {
                connection.abort();
                return Ok(());
            }
        }
        // Whatever the message says, a lost one (overrun) included: the list is read again.
        if let Ok(Some(_)) = tokio::time::timeout(RESYNC, messages.next()).await {
            settle(&mut messages).await;
        }
    }
}

/// Waits for a pause of [`SETTLE`], no longer than [`SETTLE_AT_MOST`].
async fn settle(messages: &mut (impl Stream + Unpin)) {
    let limit = tokio::time::sleep(SETTLE_AT_MOST);
    tokio::pin!(limit);
    loop {
        tokio::select! {
            biased;
            () = &mut limit => return,
            message = tokio::time::timeout(SETTLE, messages.next()) => {
                if !matches!(message, Ok(Some(_))) {
                    return;
                }
            }
        }
        // Messages without any pause at all must not keep the clock from being looked at.
        tokio::task::consume_budget().await;
    }
}

/// Names of all interfaces, whatever their bytes: one line each, `name: counters`, behind two lines of headings.
/// Empty where it cannot be read.
fn names() -> BTreeSet<Raw> {
    let text = std::fs::read("/proc/net/dev").unwrap_or_default();
    let lines = text.split(|byte| *byte == b'\n').skip(2);
    lines
        .filter_map(|line| line.split(|byte| *byte == b':').next().filter(|name| name.len() < line.len()))
        .map(|name| Raw::new(name.trim_ascii()))
        .collect()
}

/// Those that were there before and after the listing and are not in it.
fn hidden(before: BTreeSet<Raw>, links: &[Link], after: &BTreeSet<Raw>) -> Vec<Raw> {
    let listed = |name: &Raw| links.iter().any(|link| link.name.as_bytes() == name.as_bytes());
    before.into_iter().filter(|name| !listed(name) && after.contains(name)).collect()
}

async fn list_with(handle: &rtnetlink::Handle) -> Result<Listing, LinksError> {
    let before = names();
    let links = links_with(handle).await?;
    let hidden = hidden(before, &links, &names());
    Ok(Listing { links, hidden })
}

async fn links_with(handle: &rtnetlink::Handle) -> Result<Vec<Link>, LinksError> {
    let mut links = BTreeMap::new();
    let mut stream = Box::pin(handle.link().get().execute());
    while let Some(message) = stream.try_next().await.map_err(LinksError::List)? {
        let name = message.attributes.into_iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name),
            _ => None,
        });
        let Some(name) = name else { continue };
        let index = message.header.index;
        let device = Path::new("/sys/class/net").join(&name).join("device").exists();
        links.insert(index, Link { index, name, device, on_link: Vec::new() });
    }
    let mut stream = Box::pin(handle.address().get().execute());
    while let Some(message) = stream.try_next().await.map_err(LinksError::List)? {
        // IFA_LOCAL is ours where the link is point-to-point; IFA_ADDRESS is the prefix in both cases.
        let address = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        });
        let prefix = address.and_then(|address| on_link(address, message.header.prefix_len));
        if let (Some(link), Some(prefix)) = (links.get_mut(&message.header.index), prefix)
            && !link.on_link.contains(&prefix)
        {
            link.on_link.push(prefix);
        }
    }
    for link in links.values_mut() {
        link.on_link.sort();
    }
    Ok(links.into_values().collect())
}

fn on_link(address: IpAddr, length: u8) -> Option<IpNet> {
    let prefix = IpNet::new(address, length).ok()?.trunc();
    let single = prefix.prefix_len() == prefix.max_prefix_len();
    (!single && length > 0 && !address.is_loopback()).then_some(prefix)
}

/// Which interfaces to watch: names, globs (`usb*`), or [`Choice::AUTO`].
#[derive(Clone, Debug)]
pub struct Choice {
    auto: bool,
    names: Vec<String>,
    globs: GlobSet,
}

impl Choice {
    /// Every interface with a bus device behind it: a packet that crosses a bridge, bond, VLAN or
    /// tunnel crosses one of these too, and would otherwise be counted twice.
    pub const AUTO: &str = "auto";
    /// Is never watched.
    const LOOPBACK: &str = "lo";

    /// Reads the patterns.
    ///
    /// # Errors
    /// The pattern that is not one, and why.
    pub fn new(patterns: &[String]) -> Result<Self, String> {
        let mut choice = Self { auto: false, names: Vec::new(), globs: GlobSet::empty() };
        let mut globs = GlobSetBuilder::new();
        for pattern in patterns {
            if pattern == Self::AUTO {
                choice.auto = true;
            } else if pattern == Self::LOOPBACK {
                return Err("`lo` is never watched: what crosses it does not leave this PC".to_owned());
            } else if pattern.contains(['*', '?', '[', '{']) {
                globs.add(Glob::new(pattern).map_err(|error| error.to_string())?);
            } else if pattern.is_empty() || pattern.len() > 15 || pattern.contains('/') {
                let shown = Raw::from(pattern.as_str());
                return Err(format!("`{}` cannot be an interface's name", shown.escaped()));
            } else {
                choice.names.push(pattern.clone());
            }
        }
        choice.globs = globs.build().map_err(|error| error.to_string())?;
        Ok(choice)
    }

    /// True when this interface is to be watched. The loopback never is.
    pub fn wants(&self, link: &Link) -> bool {
        link.name != Self::LOOPBACK
            && (self.auto && link.device
                || self.names.contains(&link.name)
                || self.globs.is_match(&link.name))
    }

    /// Names that were asked for and do not exist.
    pub fn missing<'a>(&'a self, links: &'a [Link]) -> impl Iterator<Item = &'a str> {
        self.names.iter().map(String::as_str).filter(|name| links.iter().all(|link| link.name != *name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, device: bool) -> Link {
        Link { index: 1, name: name.into(), device, on_link: Vec::new() }
    }

    fn choice(patterns: &[&str]) -> Choice {
        let patterns: Vec<_> = patterns.iter().map(|p| (*p).to_owned()).collect();
        Choice::new(&patterns).unwrap()
    }

    #[test]
    fn auto_takes_what_has_a_device_behind_it() {
        let auto = choice(&["auto"]);
        assert!(auto.wants(&link("enp3s0", true)));
        assert!(!auto.wants(&link("br0", false)));
    }

    #[test]
    fn names_and_globs_take_what_they_name_and_never_the_loopback() {
        let some = choice(&["lan0", "usb*"]);
        assert!(some.wants(&link("lan0", false)) && some.wants(&link("usb7", true)));
        assert!(!some.wants(&link("eth0", true)));
        assert!(!choice(&["*"]).wants(&link("lo", false)));
        let links = [link("usb0", true)];
        assert_eq!(some.missing(&links).collect::<Vec<_>>(), ["lan0"]);
    }

    #[test]
    fn a_name_that_cannot_be_is_refused() {
        for bad in ["", "a/b", "lo", "sixteen-letters-", "usb[*"] {
            assert!(Choice::new(&[bad.to_owned()]).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn chatter_does_not_hold_off_the_list() {
        let mut chatter = Box::pin(futures_util::stream::repeat(()).then(|()| async {
            tokio::time::sleep(SETTLE / 4).await;
        }));
        tokio::time::timeout(SETTLE_AT_MOST * 4, settle(&mut chatter)).await.unwrap();
        let mut torrent = futures_util::stream::repeat(());
        tokio::time::timeout(SETTLE_AT_MOST * 4, settle(&mut torrent)).await.unwrap();
    }

    #[test]
    fn what_netlink_does_not_list_and_stays_is_hidden() {
        let names = |names: &[&[u8]]| names.iter().map(|name| Raw::new(*name)).collect();
        let before = names(&[b"eth0", b"usb\xff", b"gone"]);
        let after = names(&[b"eth0", b"usb\xff", b"new"]);
        let links = [link("eth0", true)];
        assert_eq!(hidden(before, &links, &after), [Raw::new(b"usb\xff")]);
        assert!(super::names().contains(&Raw::from("lo")));
    }

    #[test]
    fn single_addresses_and_loopback_are_no_neighbourhood() {
        let on_link =
            |address: &str, length| on_link(address.parse().unwrap(), length).map(|p| p.to_string());
        assert_eq!(on_link("10.77.0.11", 24), Some("10.77.0.0/24".into()));
        assert_eq!(on_link("2001:db8::1", 64), Some("2001:db8::/64".into()));
        assert_eq!(on_link("10.77.0.11", 32), None);
        assert_eq!(on_link("127.0.0.1", 8), None);
    }
}
