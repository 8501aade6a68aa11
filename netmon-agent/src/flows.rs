//! What flows moved becomes activity: under which transfer or ledger label.
//!
//! Pure: fed with what one sweep of the kernel's tables brought.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;

use netmon_common::abi::{self, FlowState};
use netmon_common::model::{Opened, Service, Traffic};

use crate::kernel::{FlowDelta, FlowId};
use crate::ledger;
use crate::transfers::{Activity, Key, Through};

/// Flows that are remembered at most: some 200 bytes each. What moves beyond is taken in all the same, but who opened such
/// a flow is known from its own packets only.
pub const MAX_KNOWN: usize = 131_072;

/// What decides where a flow's bytes go.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Labels of the filter list, by the index that the kernel has.
    pub labels: Vec<String>,
    /// Muted service ports with their ledger labels.
    pub services: HashMap<Service, String>,
    /// The agent's own connections to the server: local UDP port and the server's address.
    pub own: Vec<(u16, SocketAddr)>,
}

/// Where a flow's bytes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Part of a transfer.
    Activity(Activity),
    /// Summed under a label; the second field counts flows that are new in the ledger's period.
    Muted(String, Traffic, u64),
}

/// The flows that moved lately, over all CPUs.
#[derive(Debug, Default)]
pub struct Flows {
    known: HashMap<FlowId, Known>,
    /// Flows that moved since they were last shown.
    moved: VecDeque<FlowId>,
}

#[derive(Debug)]
struct Known {
    /// All that is known of it.
    state: FlowState,
    /// Who seems to have called, `OPENED_`: whoever opened it, or else the only side that was heard at first. The service is
    /// told by it, and must not change while both sides talk.
    caller: u8,
    /// It is in `moved`.
    queued: bool,
    /// The ledger's period in which it was last counted as a flow.
    period: Option<u64>,
}

impl Flows {
    /// Turns what one sweep brought into what moved, transfers' activities in order of time.
    ///
    /// `interface` tells of an interface by index; `period` is the ledger's.
    pub fn observe(
        &mut self,
        deltas: &mut [FlowDelta],
        policy: &Policy,
        period: u64,
        interface: impl Fn(u32) -> Through,
    ) -> Vec<Moved> {
        // The first packet tells who opened a flow, and each CPU has another first one.
        deltas.sort_by_key(|delta| delta.first_ns);
        for delta in deltas.iter() {
            self.learn(delta);
        }
        let mut moved: Vec<Moved> = deltas
            .iter()
            .map(|delta| {
                let known = self.known.get_mut(&delta.flow);
                let (opened, caller, hints) =
                    known.as_ref().map_or((delta.opened, caller_of(delta), delta.hints), |k| {
                        (k.state.opened, k.caller, k.state.hints)
                    });
                let service = service_of(&delta.flow, caller, hints);
                let traffic = traffic_of(delta);
                match mute_label(delta, service, policy) {
                    Some(label) => {
                        let before = known.map(|known| known.period.replace(period));
                        Moved::Muted(label, traffic, u64::from(before != Some(Some(period))))
                    }
                    None => Moved::Activity(Activity {
                        key: key_of(delta, service),
                        service,
                        opened: opened_of(opened),
                        interface: interface(delta.ifindex),
                        first_ns: delta.first_ns,
                        last_ns: delta.last_ns,
                        traffic,
                    }),
                }
            })
            .collect();
        moved.sort_by_key(|moved| match moved {
            Moved::Muted(..) => (0, 0),
            Moved::Activity(activity) => (activity.first_ns, activity.last_ns),
        });
        moved
    }

    fn learn(&mut self, delta: &FlowDelta) {
        let full = self.known.len() >= MAX_KNOWN;
        let known = match self.known.entry(delta.flow) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(_) if full => return,
            std::collections::hash_map::Entry::Vacant(place) => place.insert(Known {
                state: FlowState {
                    first_ns: delta.first_ns,
                    ifindex: delta.ifindex,
                    opened: delta.opened,
                    ..FlowState::default()
                },
                caller: caller_of(delta),
                queued: false,
                period: None,
            }),
        };
        let state = &mut known.state;
        *state += delta.moved;
        state.last_ns = state.last_ns.max(delta.last_ns);
        (state.class, state.label) = (delta.class, delta.label);
        state.tcp_flags |= delta.tcp_flags;
        state.hints |= delta.hints;
        // TCP's flags are proof. Of UDP only the very first packet tells, and another CPU's may be read later.
        let earlier = delta.first_ns < state.first_ns;
        let proof = delta.flow.protocol == abi::IPPROTO_TCP && state.opened == abi::OPENED_UNKNOWN;
        if earlier {
            (state.first_ns, state.ifindex) = (delta.first_ns, delta.ifindex);
        }
        if (earlier || proof) && delta.opened != abi::OPENED_UNKNOWN {
            state.opened = delta.opened;
            known.caller = delta.opened;
        }
        if !std::mem::replace(&mut known.queued, true) {
            self.moved.push_back(delta.flow);
        }
    }

    /// A flow that has moved since this last returned it, with its sums; `None` when there is none.
    pub fn next_moved(&mut self) -> Option<(FlowId, FlowState)> {
        loop {
            let flow = self.moved.pop_front()?;
            // It may have been forgotten meanwhile.
            if let Some(known) = self.known.get_mut(&flow) {
                known.queued = false;
                return Some((flow, known.state));
            }
        }
    }

    /// Forgets flows that are silent, the sooner the more there are, and returns them.
    pub fn forget(&mut self, now_boot_ns: u64) -> Vec<FlowId> {
        let after_ns = forget_after_ns(self.known.len());
        let silent = |known: &Known| now_boot_ns.saturating_sub(known.state.last_ns) >= after_ns;
        self.known.extract_if(|_, known| silent(known)).map(|(flow, _)| flow).collect()
    }

    /// Flows that are remembered.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// True when no flow is remembered.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }
}

/// How long a flow is remembered after its last packet. A flow that comes back later is a new one, and a connection's
/// opener and protocol are told by its first packets: remember it while there is room.
fn forget_after_ns(flows: usize) -> u64 {
    const SECOND_NS: u64 = 1_000_000_000;
    match flows {
        0..2_048 => 300 * SECOND_NS,
        2_048..16_384 => 30 * SECOND_NS,
        16_384..65_536 => 10 * SECOND_NS,
        _ => 3 * SECOND_NS,
    }
}

fn traffic_of(delta: &FlowDelta) -> Traffic {
    let moved = &delta.moved;
    Traffic {
        tx_bytes: moved.tx_bytes,
        rx_bytes: moved.rx_bytes,
        tx_payload: moved.tx_payload,
        rx_payload: moved.rx_payload,
        tx_packets: moved.tx_packets,
        rx_packets: moved.rx_packets,
    }
}

/// Who seems to have called: the opener, or else, for UDP, the only side that was heard.
fn caller_of(delta: &FlowDelta) -> u8 {
    let tcp = delta.flow.protocol == abi::IPPROTO_TCP;
    match (delta.opened, delta.moved.tx_packets, delta.moved.rx_packets) {
        (abi::OPENED_UNKNOWN, 1.., 0) if !tcp => abi::OPENED_HERE,
        (abi::OPENED_UNKNOWN, 0, 1..) if !tcp => abi::OPENED_THERE,
        (opened, ..) => opened,
    }
}

fn opened_of(opened: u8) -> Opened {
    match opened {
        abi::OPENED_HERE => Opened::Here,
        abi::OPENED_THERE => Opened::There,
        _ => Opened::Unknown,
    }
}

fn key_of(delta: &FlowDelta, service: Service) -> Key {
    // IPv4-mapped addresses (RFC 4291, section 2.5.5.2) are the IPv4 host.
    let host = delta.flow.remote.ip().to_canonical();
    if delta.class == abi::CLASS_LAN { Key::Lan(host) } else { Key::Internet(host, service) }
}

/// The service is the port of the side that was called. TCP says who called; for UDP the first packet that was
/// seen may be an answer, so a well-known port (RFC 6335: below 1024) counts more than the order.
fn service_of(flow: &FlowId, caller: u8, hints: u8) -> Service {
    let (local, remote) = (flow.local.port(), flow.remote.port());
    let tcp = flow.protocol == abi::IPPROTO_TCP;
    let well_known = |port: u16| port != 0 && port < 1024;
    let by_port = match (well_known(local), well_known(remote)) {
        (true, false) => Some(local),
        (false, true) => Some(remote),
        _ => None,
    };
    let by_caller = match opened_of(caller) {
        Opened::Here => Some(remote),
        Opened::There => Some(local),
        Opened::Unknown => None,
    };
    let lower = local.min(remote);
    let port = if tcp { by_caller.or(by_port) } else { by_port.or(by_caller) }.unwrap_or(lower);
    match (tcp, hints & abi::HINT_QUIC != 0) {
        (true, _) => Service::Tcp(port),
        (false, true) => Service::Quic(port),
        (false, false) => Service::Udp(port),
    }
}

fn mute_label(delta: &FlowDelta, service: Service, policy: &Policy) -> Option<String> {
    let flow = &delta.flow;
    let is_ours = |(port, server): &(u16, SocketAddr)| {
        flow.local.port() == *port
            && flow.remote == SocketAddr::new(server.ip().to_canonical(), server.port())
    };
    if flow.protocol == abi::IPPROTO_UDP && policy.own.iter().any(is_ours) {
        return Some(ledger::OWN.to_owned());
    }
    match delta.class {
        abi::CLASS_GROUP => Some(ledger::GROUP.to_owned()),
        abi::CLASS_MUTED => Some(match policy.labels.get(usize::from(delta.label)) {
            Some(label) => label.clone(),
            None => format!("label-{}", delta.label),
        }),
        _ => policy.services.get(&service).map(|name| format!("service:{name}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel;

    const S: u64 = 1_000_000_000;

    fn flow(local: &str, remote: &str, protocol: u8) -> FlowId {
        FlowId { local: local.parse().unwrap(), remote: remote.parse().unwrap(), protocol }
    }

    fn copy() -> FlowId {
        flow("10.0.0.1:40000", "10.0.0.2:9000", abi::IPPROTO_TCP)
    }

    fn delta(flow: FlowId, class: u8, first_ns: u64, last_ns: u64, packets: u64) -> FlowDelta {
        FlowDelta {
            flow,
            moved: kernel::Moved {
                tx_packets: packets,
                tx_bytes: packets * 1_040,
                tx_payload: packets * 1_000,
                ..kernel::Moved::default()
            },
            first_ns,
            last_ns,
            ifindex: 2,
            label: 0,
            class,
            opened: abi::OPENED_HERE,
            tcp_flags: 0,
            hints: 0,
        }
    }

    fn look(flows: &mut Flows, policy: &Policy, deltas: &mut [FlowDelta]) -> Vec<Moved> {
        flows.observe(deltas, policy, 1, |_| "eth0".into())
    }

    fn only_activity(moved: Vec<Moved>) -> Activity {
        match moved.as_slice() {
            [Moved::Activity(activity)] => activity.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_the_cpus_have_of_a_flow_is_one_flow_opened_by_its_first_packet() {
        let (mut flows, policy) = (Flows::default(), Policy::default());
        let answer =
            FlowDelta { opened: abi::OPENED_THERE, ..delta(copy(), abi::CLASS_LAN, 2 * S, 3 * S, 4) };
        let question = delta(copy(), abi::CLASS_LAN, S, 2 * S, 3);
        let moved = look(&mut flows, &policy, &mut [answer, question]);
        let activities: Vec<_> = moved
            .iter()
            .map(|moved| match moved {
                Moved::Activity(a) => (a.first_ns, a.opened, a.traffic.tx_packets),
                Moved::Muted(..) => panic!(),
            })
            .collect();
        assert_eq!(activities, [(S, Opened::Here, 3), (2 * S, Opened::Here, 4)]);
        let (flow, state) = flows.next_moved().unwrap();
        assert_eq!((flow, state.tx_packets, state.first_ns, state.last_ns), (copy(), 7, S, 3 * S));
        assert_eq!(flows.next_moved(), None);
    }

    #[test]
    fn a_flow_that_got_another_slot_midway_keeps_its_opener_and_protocol() {
        let (mut flows, policy) = (Flows::default(), Policy::default());
        let web = flow("10.0.0.1:40000", "198.51.100.10:443", abi::IPPROTO_UDP);
        let first = FlowDelta { hints: abi::HINT_QUIC, ..delta(web, abi::CLASS_INTERNET, S, S, 1) };
        look(&mut flows, &policy, &mut [first]);
        let later =
            FlowDelta { opened: abi::OPENED_THERE, ..delta(web, abi::CLASS_INTERNET, 2 * S, 2 * S, 1) };
        let activity = only_activity(look(&mut flows, &policy, &mut [later]));
        assert_eq!(activity.key, Key::Internet("198.51.100.10".parse().unwrap(), Service::Quic(443)));
        assert_eq!(activity.opened, Opened::Here);
    }

    #[test]
    fn an_earlier_first_packet_that_is_read_later_tells_the_opener() {
        let (mut flows, policy) = (Flows::default(), Policy::default());
        let talk = flow("10.0.0.1:40000", "198.51.100.10:9000", abi::IPPROTO_UDP);
        let answer =
            FlowDelta { opened: abi::OPENED_THERE, ..delta(talk, abi::CLASS_INTERNET, 2 * S, 2 * S, 1) };
        look(&mut flows, &policy, &mut [answer]);
        let question = FlowDelta { ifindex: 7, ..delta(talk, abi::CLASS_INTERNET, S, S, 1) };
        let activity = only_activity(look(&mut flows, &policy, &mut [question]));
        assert_eq!((activity.opened, activity.service), (Opened::Here, Service::Udp(9000)));
        let (_, state) = flows.next_moved().unwrap();
        assert_eq!((state.first_ns, state.ifindex), (S, 7));
    }

    #[test]
    fn a_udp_flow_of_unknown_opener_stays_so_and_its_service_is_told_by_the_side_that_was_heard() {
        let (mut flows, policy) = (Flows::default(), Policy::default());
        let talk = flow("10.0.0.1:1024", "198.51.100.10:9000", abi::IPPROTO_UDP);
        let crowded = FlowDelta { opened: abi::OPENED_UNKNOWN, ..delta(talk, abi::CLASS_INTERNET, S, S, 1) };
        let activity = only_activity(look(&mut flows, &policy, &mut [crowded]));
        assert_eq!((activity.opened, activity.service), (Opened::Unknown, Service::Udp(9000)));
        // The answer had an exact clock, but was not the first packet.
        let answer = FlowDelta {
            opened: abi::OPENED_THERE,
            moved: kernel::Moved { rx_packets: 1, ..kernel::Moved::default() },
            ..delta(talk, abi::CLASS_INTERNET, 2 * S, 2 * S, 1)
        };
        let activity = only_activity(look(&mut flows, &policy, &mut [answer]));
        assert_eq!((activity.opened, activity.service), (Opened::Unknown, Service::Udp(9000)));
    }

    #[test]
    fn silent_flows_are_forgotten_the_sooner_the_more_there_are() {
        let (mut flows, policy) = (Flows::default(), Policy::default());
        let many: Vec<_> = (0..100_000_u32)
            .map(|n| {
                let remote = format!("10.{}.{}.{}:9", n >> 16, n >> 8 & 255, n & 255);
                delta(flow("10.0.0.1:1", &remote, abi::IPPROTO_UDP), abi::CLASS_LAN, S, S, 1)
            })
            .collect();
        look(&mut flows, &policy, &mut many.clone()[..1_000]);
        assert_eq!(flows.forget(300 * S).len(), 0);
        look(&mut flows, &policy, &mut many.clone());
        assert_eq!(flows.forget(3 * S).len(), 0);
        assert_eq!(flows.forget(4 * S).len(), 100_000);
        assert!(flows.is_empty());
        assert_eq!(flows.next_moved(), None);
    }

    #[test]
    fn what_cannot_be_remembered_is_taken_in_all_the_same() {
        let (mut flows, policy) = (Flows::default(), Policy::default());
        let mut many: Vec<_> = (0..MAX_KNOWN as u32 + 10)
            .map(|n| {
                let remote = format!("10.{}.{}.{}:9", n >> 16, n >> 8 & 255, n & 255);
                delta(flow("10.0.0.1:1", &remote, abi::IPPROTO_UDP), abi::CLASS_LAN, S, S, 1)
            })
            .collect();
        assert_eq!(look(&mut flows, &policy, &mut many).len(), MAX_KNOWN + 10);
        assert_eq!(flows.len(), MAX_KNOWN);
    }

    #[test]
    fn lan_is_one_counterpart_and_internet_is_told_apart_by_service() {
        let (mut flows, policy) = (Flows::default(), Policy::default());
        let lan = only_activity(look(&mut flows, &policy, &mut [delta(copy(), abi::CLASS_LAN, S, S, 1)]));
        assert_eq!(lan.key, Key::Lan("10.0.0.2".parse().unwrap()));
        let web = flow("10.0.0.1:40000", "198.51.100.10:443", abi::IPPROTO_UDP);
        let quic = FlowDelta { hints: abi::HINT_QUIC, ..delta(web, abi::CLASS_INTERNET, S, S, 1) };
        let web = only_activity(look(&mut flows, &policy, &mut [quic]));
        assert_eq!(web.key, Key::Internet("198.51.100.10".parse().unwrap(), Service::Quic(443)));
    }

    #[test]
    fn the_service_is_the_port_that_was_called() {
        let ssh_in = flow("10.0.0.1:22", "10.0.0.2:50000", abi::IPPROTO_TCP);
        assert_eq!(service_of(&ssh_in, abi::OPENED_THERE, 0), Service::Tcp(22));
        assert_eq!(service_of(&ssh_in, abi::OPENED_UNKNOWN, 0), Service::Tcp(22));
        let high = flow("10.0.0.1:8080", "10.0.0.2:5201", abi::IPPROTO_TCP);
        assert_eq!(service_of(&high, abi::OPENED_THERE, 0), Service::Tcp(8080));
        // The first packet that was seen of this DNS exchange was the answer.
        let dns = flow("10.0.0.1:50000", "192.0.2.53:53", abi::IPPROTO_UDP);
        assert_eq!(service_of(&dns, abi::OPENED_THERE, 0), Service::Udp(53));
    }

    #[test]
    fn muted_traffic_goes_to_its_label_and_a_flow_counts_once_a_period() {
        let policy = Policy {
            labels: vec!["amazon".into()],
            services: HashMap::from([(Service::Udp(53), "dns".into())]),
            own: vec![(7000, "10.0.0.9:7443".parse().unwrap())],
        };
        let mut flows = Flows::default();
        let mut label = |remote: &str, local: &str, class, packets| {
            let flow = flow(local, remote, abi::IPPROTO_UDP);
            match look(&mut flows, &policy, &mut [delta(flow, class, S, S, packets)]).as_slice() {
                [Moved::Muted(label, traffic, new)] => (label.clone(), traffic.tx_packets, *new),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(label("203.0.113.1:9", "10.0.0.1:40000", abi::CLASS_MUTED, 2), ("amazon".into(), 2, 1));
        assert_eq!(label("203.0.113.1:9", "10.0.0.1:40000", abi::CLASS_MUTED, 3), ("amazon".into(), 3, 0));
        assert_eq!(label("10.0.0.53:53", "10.0.0.1:40001", abi::CLASS_LAN, 1), ("service:dns".into(), 1, 1));
        assert_eq!(label("224.0.0.251:5353", "10.0.0.1:5353", abi::CLASS_GROUP, 1), ("group".into(), 1, 1));
        assert_eq!(label("10.0.0.9:7443", "10.0.0.1:7000", abi::CLASS_LAN, 1), ("netmon".into(), 1, 1));
    }
}
