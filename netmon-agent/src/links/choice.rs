//! Which interfaces are watched, and why the others are not. The whole table: docs/interfaces.md.

use std::collections::BTreeMap;
use std::fmt;

use globset::{Glob, GlobSet, GlobSetBuilder};
use ipnet::IpNet;
use netmon_common::raw::Raw;

use super::{Backing, Link, sysfs};

/// Which interfaces to watch: names, globs (`usb*`), or [`Choice::AUTO`].
#[derive(Clone, Debug)]
pub struct Choice {
    auto: bool,
    names: Vec<String>,
    globs: GlobSet,
}

/// What [`Choice::judge`] says of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is to be watched.
    Watch,
    /// It is not, because of this.
    Leave(Reason),
}

/// Why an interface is not watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// What crosses it does not leave this PC.
    Loopback,
    /// It was not named, and the choice is by name alone.
    NotNamed,
    /// Its link type carries no IP packets of this PC: CAN, IEEE 802.15.4, a Wi-Fi card that listens to others.
    NoIp,
    /// No device stands behind it; it stands on the interface of this name, if any.
    OnTop(Option<String>),
    /// It is a part of this interface, which has a device itself and sees all that this one sees.
    PartOf(String),
    /// The switch's ports are watched instead.
    SwitchConduit,
    /// A virtual machine's end; what leaves this PC crosses another interface.
    VirtualMachine,
    /// A tunnel inside packets that leave by another interface.
    Tunnel,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |name: &str| Raw::from(name).escaped().to_string();
        match self {
            Self::Loopback => write!(f, "what crosses it does not leave this PC"),
            Self::NotNamed => write!(f, "not among capture.interfaces"),
            Self::NoIp => write!(f, "carries no IP packets of this PC"),
            Self::OnTop(Some(lower)) => write!(f, "no device of its own; its packets cross {}", name(lower)),
            Self::OnTop(None) => {
                write!(f, "no device behind it; what leaves this PC through it crosses another interface")
            }
            Self::PartOf(master) => write!(f, "all its packets cross {}", name(master)),
            Self::SwitchConduit => write!(f, "carries the frames of the switch's ports, which are watched"),
            Self::VirtualMachine => write!(f, "leads to a virtual machine on this PC"),
            Self::Tunnel => write!(f, "a tunnel; its outer packets cross another interface"),
        }
    }
}

/// An interface that is not watched, and why. Shown as `name: reason`, on one line whatever the name.
#[derive(Clone, Copy, Debug)]
pub struct Left<'a> {
    /// The interface.
    pub link: &'a Link,
    /// Why.
    pub reason: &'a Reason,
}

impl fmt::Display for Left<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", Raw::from(self.link.name.as_str()).escaped(), self.reason)
    }
}

impl Left<'_> {
    /// May somebody expect that it is watched? With a device behind it, an address by which hosts on its link reach this
    /// PC, or another network's packets in it: yes. The ends of containers' and virtual machines' cables, of which there
    /// may be hundreds: no.
    pub fn is_asked_about(&self) -> bool {
        let Link { backing, link_type, on_link, .. } = self.link;
        *self.reason != Reason::Loopback
            && (*backing != Backing::Nothing
                || *link_type == NO_HEADER
                || on_link.iter().any(is_beyond_the_link))
    }
}

/// Every up interface has a link-local prefix (RFC 4291, 2.5.6): it says nothing.
fn is_beyond_the_link(prefix: &IpNet) -> bool {
    match prefix {
        IpNet::V4(_) => true,
        IpNet::V6(prefix) => !prefix.addr().is_unicast_link_local(),
    }
}

/// Interfaces that are left, by these verdicts, in the order of `links`.
pub fn left<'a>(
    links: impl IntoIterator<Item = &'a Link>,
    verdicts: &'a BTreeMap<u32, Verdict>,
) -> impl Iterator<Item = Left<'a>> {
    links.into_iter().filter_map(|link| match verdicts.get(&link.index) {
        Some(Verdict::Leave(reason)) => Some(Left { link, reason }),
        Some(Verdict::Watch) | None => None,
    })
}

/// `ARPHRD_NONE`: tun, WireGuard.
const NO_HEADER: u16 = 0xfffe;
/// `ARPHRD_LOOPBACK`.
const LOOPBACK: u16 = 772;
/// `ARPHRD_CAN`, `_IEEE80211`, `_IEEE80211_PRISM`, `_IEEE80211_RADIOTAP`, `_IEEE802154`, `_IEEE802154_MONITOR`,
/// `_NETLINK`, `_VSOCKMON`.
const NO_IP: [u16; 8] = [280, 801, 802, 803, 804, 805, 824, 826];
/// Virtual interfaces whose packets cannot be read on the interface below: encrypted there (MACsec), or inside frames
/// of another protocol (modems of Qualcomm's kind, B.A.T.M.A.N. meshes).
const UNREADABLE_BELOW: [&str; 3] = ["macsec", "rmnet", "batadv"];
/// `ARPHRD_SLIP`, `_CSLIP`, `_SLIP6`, `_CSLIP6` and `_ADAPT`: IP over a serial line.
const SERIAL_LINE: [u16; 5] = [256, 257, 258, 259, 264];

impl Choice {
    /// Every interface with a bus device behind it, and those that stand on other things where their packets cannot be
    /// read below them (PPP, MACsec, channels of modems). A packet that crosses a bridge, bond, VLAN or tunnel crosses
    /// one of these too, and would otherwise be counted twice.
    pub const AUTO: &str = "auto";

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
            } else if pattern == "lo" {
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

    /// Judges every interface, by index. A name or a glob overrules all reasons but the loopback's.
    pub fn judge(&self, links: &[Link]) -> BTreeMap<u32, Verdict> {
        links.iter().map(|link| (link.index, self.judge_one(link, links))).collect()
    }

    /// Names that were asked for and do not exist.
    pub fn missing<'a>(&'a self, links: &'a [Link]) -> impl Iterator<Item = &'a str> {
        self.names.iter().map(String::as_str).filter(|name| links.iter().all(|link| link.name != *name))
    }

    fn judge_one(&self, link: &Link, links: &[Link]) -> Verdict {
        if link.link_type == LOOPBACK {
            Verdict::Leave(Reason::Loopback)
        } else if self.names.contains(&link.name) || self.globs.is_match(&link.name) {
            Verdict::Watch
        } else if self.auto {
            reason(link, links).map_or(Verdict::Watch, Verdict::Leave)
        } else {
            Verdict::Leave(Reason::NotNamed)
        }
    }
}

/// Why [`Choice::AUTO`] leaves an interface; `None`: it does not.
fn reason(link: &Link, links: &[Link]) -> Option<Reason> {
    let find = |index: Option<u32>| links.iter().find(|link| Some(link.index) == index);
    if NO_IP.contains(&link.link_type) {
        return Some(Reason::NoIp);
    }
    match link.backing {
        Backing::SwitchConduit => return Some(Reason::SwitchConduit),
        Backing::VirtualMachine => return Some(Reason::VirtualMachine),
        Backing::Tunnel => return Some(Reason::Tunnel),
        Backing::Device | Backing::ModemChannel | Backing::Nothing => {}
    }
    // A bond has no device, and its members are watched. Where the master has one (a virtual machine's network card and
    // the hardware that speeds it up, behind one interface), the member's packets cross both.
    let master = find(link.master).filter(|master| master.backing == Backing::Device);
    if let Some(master) = master {
        return Some(Reason::PartOf(master.name.clone()));
    }
    let unreadable_below = UNREADABLE_BELOW.contains(&link.kind.as_str())
        || link.link_type == sysfs::PPP
        || SERIAL_LINE.contains(&link.link_type);
    if link.backing != Backing::Nothing || unreadable_below {
        return None;
    }
    Some(Reason::OnTop(find(link.lower).map(|lower| lower.name.clone())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETHER: u16 = 1;
    /// `ARPHRD_NONE`.
    const RAW: u16 = 0xfffe;

    /// An interface on nothing; its index is its place in [`judge`]'s list.
    fn link(name: &str, link_type: u16, kind: &str) -> Link {
        Link {
            index: 0,
            name: name.into(),
            link_type,
            kind: kind.into(),
            master: None,
            lower: None,
            backing: Backing::Nothing,
            usb: false,
            on_link: Vec::new(),
        }
    }

    fn card(name: &str) -> Link {
        Link { backing: Backing::Device, ..link(name, ETHER, "") }
    }

    fn on(lower: u32, link: Link) -> Link {
        Link { lower: Some(lower), ..link }
    }

    fn part_of(master: u32, link: Link) -> Link {
        Link { master: Some(master), ..link }
    }

    fn choice(patterns: &[&str]) -> Choice {
        let patterns: Vec<_> = patterns.iter().map(|p| (*p).to_owned()).collect();
        Choice::new(&patterns).unwrap()
    }

    /// Names of those that are watched. The links get the indexes 1, 2, …
    fn watched(patterns: &[&str], mut links: Vec<Link>) -> Vec<String> {
        for (link, index) in links.iter_mut().zip(1..) {
            link.index = index;
        }
        let verdicts = choice(patterns).judge(&links);
        assert_eq!(verdicts.len(), links.len(), "each one is judged");
        links.retain(|link| verdicts[&link.index] == Verdict::Watch);
        links.into_iter().map(|link| link.name).collect()
    }

    fn auto(links: Vec<Link>) -> Vec<String> {
        watched(&["auto"], links)
    }

    #[test]
    fn auto_takes_network_cards_wifi_usb_adapters_and_modems() {
        let wwan = Link { backing: Backing::Device, ..link("wwan0", 519, "wwan") };
        let names = ["enp3s0", "wlp2s0", "enx00e04c680001", "bnep0", "p2p-wlan0-0"];
        let mut links: Vec<_> = names.into_iter().map(card).collect();
        links.push(wwan);
        assert_eq!(auto(links), ["enp3s0", "wlp2s0", "enx00e04c680001", "bnep0", "p2p-wlan0-0", "wwan0"]);
    }

    #[test]
    fn of_a_stack_auto_takes_the_cards_alone() {
        let stack = vec![
            part_of(3, card("eth0")),
            part_of(3, card("eth1")),
            part_of(4, link("bond0", ETHER, "bond")),
            link("br0", ETHER, "bridge"),
            on(4, link("br0.7", ETHER, "vlan")),
            on(4, link("mac0", ETHER, "macvlan")),
            part_of(4, link("vnet0", ETHER, "tun")),
            link("tun0", RAW, "tun"),
            link("wg0", RAW, "wireguard"),
            link("docker0", ETHER, "bridge"),
            part_of(10, link("veth1", ETHER, "veth")),
            link("sit0", 776, "sit"),
        ];
        assert_eq!(auto(stack), ["eth0", "eth1"]);
    }

    #[test]
    fn of_a_card_and_the_hardware_that_speeds_it_up_the_whole_is_watched() {
        // Hyper-V: the synthetic card is the master of the hardware's virtual function.
        assert_eq!(auto(vec![card("eth0"), part_of(1, card("enP1s1"))]), ["eth0"]);
        // virtio's failover: one master with a device over two with devices.
        assert_eq!(
            auto(vec![card("ens3"), part_of(1, card("ens3nsby")), part_of(1, card("ens4"))]),
            ["ens3"]
        );
    }

    #[test]
    fn what_cannot_be_read_below_is_watched_above() {
        let ppp = link("ppp0", sysfs::PPP, "ppp");
        assert_eq!(auto(vec![card("eth0"), ppp.clone()]), ["eth0", "ppp0"]);
        let tunnel = Link { backing: Backing::Tunnel, ..ppp };
        assert_eq!(auto(vec![card("eth0"), tunnel]), ["eth0"], "PPP over L2TP can be seen below");
        assert_eq!(auto(vec![card("eth0"), on(1, link("macsec0", ETHER, "macsec"))]), ["eth0", "macsec0"]);
        assert_eq!(auto(vec![card("wwan0"), on(1, link("rmnet1", 519, "rmnet"))]), ["wwan0", "rmnet1"]);
        let channel = Link { backing: Backing::ModemChannel, ..link("qmimux0", RAW, "") };
        assert_eq!(auto(vec![card("wwan0"), channel]), ["wwan0", "qmimux0"]);
        assert_eq!(auto(vec![link("sl0", 256, "")]), ["sl0"]);
    }

    #[test]
    fn a_switch_is_watched_at_its_ports() {
        let conduit = Link { backing: Backing::SwitchConduit, ..card("eth0") };
        assert_eq!(auto(vec![conduit, on(1, card("lan1")), on(1, card("lan2"))]), ["lan1", "lan2"]);
    }

    #[test]
    fn copies_and_what_carries_no_ip_are_left() {
        let of_type = |name, link_type| Link { backing: Backing::Device, ..link(name, link_type, "") };
        assert_eq!(auto(vec![of_type("mon0", 803), of_type("can0", 280), card("wlan0")]), ["wlan0"]);
        // Not understood, and yet a way out of this PC: to be chosen, and to fail where everybody sees it.
        assert_eq!(auto(vec![of_type("firewire0", 24)]), ["firewire0"]);
        assert_eq!(auto(vec![Link { backing: Backing::VirtualMachine, ..card("vif1.0") }]), [""; 0]);
    }

    #[test]
    fn names_and_globs_overrule_auto_but_not_for_the_loopback() {
        let links =
            || vec![link("lo", LOOPBACK, ""), card("eth0"), link("br0", ETHER, "bridge"), card("usb7")];
        assert_eq!(watched(&["br0", "usb*"], links()), ["br0", "usb7"]);
        assert_eq!(watched(&["auto", "br0"], links()), ["eth0", "br0", "usb7"]);
        assert_eq!(watched(&["*"], links()), ["eth0", "br0", "usb7"]);
        let renamed = vec![link("loop", LOOPBACK, "")];
        assert_eq!(watched(&["*"], renamed), [""; 0]);
        assert_eq!(choice(&["lan0", "usb*"]).missing(&links()).collect::<Vec<_>>(), ["lan0"]);
    }

    #[test]
    fn reasons_name_the_interface_that_sees_the_packets() {
        let links = vec![
            Link { index: 1, ..card("eth0") },
            Link { index: 2, ..on(1, link("eth0.7", ETHER, "vlan")) },
            Link { index: 3, ..part_of(1, card("vf0")) },
            Link { index: 4, ..link("br0", ETHER, "bridge") },
        ];
        let verdicts = choice(&["auto"]).judge(&links);
        assert_eq!(verdicts[&2], Verdict::Leave(Reason::OnTop(Some("eth0".into()))));
        assert_eq!(verdicts[&3], Verdict::Leave(Reason::PartOf("eth0".into())));
        assert_eq!(verdicts[&4], Verdict::Leave(Reason::OnTop(None)));
        assert_eq!(choice(&["br*"]).judge(&links)[&1], Verdict::Leave(Reason::NotNamed));
        let hostile = Reason::OnTop(Some("a\nb".into())).to_string();
        assert!(!hostile.contains('\n'), "{hostile}");
    }

    #[test]
    fn those_who_may_expect_to_be_watched_are_asked_about_and_ends_of_cables_are_not() {
        let at = |prefix: &str, link: Link| Link { on_link: vec![prefix.parse().unwrap()], ..link };
        let links: Vec<_> = [
            link("lo", LOOPBACK, ""),
            card("eth0"),
            at("192.168.0.0/24", link("br0", ETHER, "bridge")),
            at("fe80::/64", part_of(3, link("veth1", ETHER, "veth"))),
            at("2001:db8::/64", link("veth2", ETHER, "veth")),
            link("wg0", RAW, "wireguard"),
            link("sit0", 776, "sit"),
            Link { backing: Backing::Device, ..link("can0", 280, "") },
        ]
        .into_iter()
        .zip(1..)
        .map(|(link, index)| Link { index, ..link })
        .collect();
        let verdicts = choice(&["auto"]).judge(&links);
        let all: Vec<_> = left(&links, &verdicts).map(|left| left.link.name.as_str()).collect();
        assert_eq!(all, ["lo", "br0", "veth1", "veth2", "wg0", "sit0", "can0"]);
        let asked: Vec<_> = left(&links, &verdicts).filter(Left::is_asked_about).collect();
        let names: Vec<_> = asked.iter().map(|left| left.link.name.as_str()).collect();
        assert_eq!(names, ["br0", "veth2", "wg0", "can0"]);
        assert_eq!(asked[3].to_string(), "can0: carries no IP packets of this PC");
    }

    #[test]
    fn a_name_that_cannot_be_is_refused() {
        for bad in ["", "a/b", "lo", "sixteen-letters-", "usb[*"] {
            assert!(Choice::new(&[bad.to_owned()]).is_err(), "{bad}");
        }
    }
}
