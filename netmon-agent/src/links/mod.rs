//! Follows the PC's interfaces and addresses (rtnetlink).
//!
//! A notification only says *that* something changed: the whole list is then read anew, so that a lost
//! notification can never leave a wrong picture for long ([`RESYNC`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt};
use ipnet::IpNet;
use netmon_common::raw::Raw;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkInfo, LinkMessage};
use tokio::sync::mpsc;

mod choice;
mod sysfs;

pub use choice::{Choice, Left, Reason, Verdict, left};

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
    /// `ARPHRD_` number (linux/if_arp.h): what its frames begin with.
    pub link_type: u16,
    /// What kind of virtual interface it is (`vlan`, `macsec`); empty where the kernel does not say.
    pub kind: String,
    /// Index of the bond, bridge or failover interface that it is a part of.
    pub master: Option<u32>,
    /// Index of the interface that it stands on, in the same network namespace.
    pub lower: Option<u32>,
    /// What stands behind it.
    pub backing: Backing,
    /// True when that is a USB device: an adapter, a phone, a modem.
    pub usb: bool,
    /// Its prefixes: whoever is in them can be reached without a router.
    pub on_link: Vec<IpNet>,
}

/// True when what crosses the interface leaves this PC through a USB device, by what it is or stands on.
pub fn is_over_usb(link: &Link, links: &BTreeMap<u32, Link>) -> bool {
    /// The kernel stacks no more (`MAX_NEST_DEV`, linux/netdevice.h).
    const DEEPEST: usize = 8;
    let below = |link: &&Link| link.lower.and_then(|index| links.get(&index));
    std::iter::successors(Some(link), below).take(DEEPEST + 1).any(|link| link.usb)
}

/// What the kernel says of where an interface's packets come from and go to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// No bus device: a bridge, bond, VLAN, veth, tunnel ...
    #[default]
    Nothing,
    /// A bus device: a network card, Wi-Fi, a USB adapter, a modem, a virtual machine's network card.
    Device,
    /// A device whose frames carry the tags of a switch's ports, which are interfaces of their own (DSA).
    SwitchConduit,
    /// This PC's end of a virtual machine's network card (Xen).
    VirtualMachine,
    /// One of several connections inside the frames of a modem (QMI).
    ModemChannel,
    /// A tunnel inside UDP or IP packets of this PC (PPP over L2TP).
    Tunnel,
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
        if let Some(mut link) = link(message) {
            link.backing = sysfs::backing(&link);
            link.usb = sysfs::is_usb(&link);
            links.insert(link.index, link);
        }
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

/// What netlink tells of an interface: neither its prefixes nor what stands behind it.
#[doc(hidden)]
pub fn link(message: LinkMessage) -> Option<Link> {
    let mut name = None;
    let (mut kind, mut master, mut lower, mut elsewhere) = (String::new(), None, None, false);
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(found) => name = Some(found),
            LinkAttribute::Controller(index) => master = Some(index),
            LinkAttribute::Link(index) => lower = Some(index),
            // Then the index is another namespace's.
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::LinkInfo(infos) => {
                let kinds = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
                kind = kinds.unwrap_or_default();
            }
            _ => {}
        }
    }
    let index = message.header.index;
    Some(Link {
        index,
        name: name?,
        link_type: message.header.link_layer_type.into(),
        kind,
        // Tunnels say 0, or themselves, where they stand on none.
        master: master.filter(|master| *master != 0),
        lower: lower.filter(|lower| !elsewhere && *lower != 0 && *lower != index),
        backing: Backing::Nothing,
        usb: false,
        on_link: Vec::new(),
    })
}

fn on_link(address: IpAddr, length: u8) -> Option<IpNet> {
    let prefix = IpNet::new(address, length).ok()?.trunc();
    let single = prefix.prefix_len() == prefix.max_prefix_len();
    (!single && length > 0 && !address.is_loopback()).then_some(prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str) -> Link {
        Link {
            index: 1,
            name: name.into(),
            link_type: 1,
            kind: String::new(),
            master: None,
            lower: None,
            backing: Backing::Device,
            usb: false,
            on_link: Vec::new(),
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
    fn what_stands_on_a_usb_adapter_leaves_through_usb() {
        let on = |index, lower, usb| (index, Link { index, lower, usb, ..link("x") });
        let links: BTreeMap<u32, Link> = [
            on(1, None, false),
            on(2, None, true),
            on(3, Some(2), false),
            on(4, Some(3), false),
            on(5, Some(1), false),
            // The kernel makes no such loop; whoever speaks for it must not hang the agent.
            on(6, Some(7), false),
            on(7, Some(6), false),
        ]
        .into();
        let over: Vec<_> = links.values().filter(|link| is_over_usb(link, &links)).map(|l| l.index).collect();
        assert_eq!(over, [2, 3, 4]);
    }

    #[test]
    fn what_netlink_does_not_list_and_stays_is_hidden() {
        let names = |names: &[&[u8]]| names.iter().map(|name| Raw::new(*name)).collect();
        let before = names(&[b"eth0", b"usb\xff", b"gone"]);
        let after = names(&[b"eth0", b"usb\xff", b"new"]);
        let links = [link("eth0")];
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
