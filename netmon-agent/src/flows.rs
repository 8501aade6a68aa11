//! Flow counters become activity: what moved since the last look, under which transfer or ledger label.
//!
//! Pure: fed with the readings of one sweep of the kernel's tables.

use std::collections::HashMap;
use std::net::SocketAddr;

use netmon_common::abi::{self, FlowState};
use netmon_common::model::{Opened, Service, Traffic};
use netmon_common::raw::Raw;

use crate::kernel::{FlowId, FlowReading};
use crate::ledger;
use crate::transfers::{Activity, Key};

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

/// The flows that the kernel's tables hold, as last seen.
#[derive(Debug, Default)]
pub struct Flows {
    known: HashMap<FlowId, Known>,
}

#[derive(Debug, Default)]
struct Known {
    total: Traffic,
    last_ns: u64,
    period: u64,
}

impl Flows {
    /// Turns the readings of one sweep into what moved, transfers' activities in order of time.
    ///
    /// `interface` names an interface by index; `period` is the ledger's.
    pub fn observe(
        &mut self,
        readings: &[FlowReading],
        policy: &Policy,
        period: u64,
        interface: impl Fn(u32) -> Raw,
    ) -> Vec<Moved> {
        let mut moved = Vec::new();
        for FlowReading { flow, state, retired } in readings {
            let known = self.known.entry(*flow).or_default();
            let total = traffic_of(state);
            // Counters of a flow that was removed and came back begin anew.
            let before = if state.first_ns > known.last_ns { Traffic::default() } else { known.total };
            let traffic = difference(total, before);
            let before_ns = std::mem::replace(&mut known.last_ns, state.last_ns);
            known.total = total;
            if traffic != Traffic::default() {
                let first_ns = if state.burst_ns > before_ns { state.burst_ns } else { before_ns };
                let one = moved_by(flow, state, traffic, first_ns, policy, &interface);
                moved.push(match one {
                    Moved::Muted(label, traffic, _) => {
                        let new = u64::from(std::mem::replace(&mut known.period, period) != period);
                        Moved::Muted(label, traffic, new)
                    }
                    activity => activity,
                });
            }
            if *retired {
                self.known.remove(flow);
            }
        }
        in_order(moved)
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

/// The same for flows that found no room in the table: each reading is one packet and complete in itself. What is
/// known of the table's flows is left alone, because such a flow may have found room since.
pub fn observe_unstored(
    readings: &[FlowReading],
    policy: &Policy,
    interface: impl Fn(u32) -> Raw,
) -> Vec<Moved> {
    let moved = readings.iter().map(|FlowReading { flow, state, .. }| {
        moved_by(flow, state, traffic_of(state), state.first_ns, policy, &interface)
    });
    in_order(moved.collect())
}

fn moved_by(
    flow: &FlowId,
    state: &FlowState,
    traffic: Traffic,
    first_ns: u64,
    policy: &Policy,
    interface: impl Fn(u32) -> Raw,
) -> Moved {
    let service = service_of(flow, state);
    match mute_label(flow, state, service, policy) {
        Some(label) => Moved::Muted(label, traffic, 0),
        None => Moved::Activity(Activity {
            key: key_of(flow, state, service),
            service,
            opened: opened_of(state),
            interface: interface(state.ifindex),
            first_ns,
            last_ns: state.last_ns,
            traffic,
        }),
    }
}

/// The ledger's first, then the transfers' in order of time.
fn in_order(mut moved: Vec<Moved>) -> Vec<Moved> {
    moved.sort_by_key(|moved| match moved {
        Moved::Muted(..) => (0, 0),
        Moved::Activity(activity) => (activity.first_ns, activity.last_ns),
    });
    moved
}

fn traffic_of(state: &FlowState) -> Traffic {
    Traffic {
        tx_bytes: state.tx_bytes,
        rx_bytes: state.rx_bytes,
        tx_payload: state.tx_payload,
        rx_payload: state.rx_payload,
        tx_packets: state.tx_packets,
        rx_packets: state.rx_packets,
    }
}

fn difference(now: Traffic, before: Traffic) -> Traffic {
    Traffic {
        tx_bytes: now.tx_bytes.saturating_sub(before.tx_bytes),
        rx_bytes: now.rx_bytes.saturating_sub(before.rx_bytes),
        tx_payload: now.tx_payload.saturating_sub(before.tx_payload),
        rx_payload: now.rx_payload.saturating_sub(before.rx_payload),
        tx_packets: now.tx_packets.saturating_sub(before.tx_packets),
        rx_packets: now.rx_packets.saturating_sub(before.rx_packets),
    }
}

fn opened_of(state: &FlowState) -> Opened {
    match state.opened {
        abi::OPENED_HERE => Opened::Here,
        abi::OPENED_THERE => Opened::There,
        _ => Opened::Unknown,
    }
}

fn key_of(flow: &FlowId, state: &FlowState, service: Service) -> Key {
    // IPv4-mapped addresses (RFC 4291, section 2.5.5.2) are the IPv4 host.
    let host = flow.remote.ip().to_canonical();
    if state.class == abi::CLASS_LAN { Key::Lan(host) } else { Key::Internet(host, service) }
}

/// The service is the port of the side that was called. TCP says who called; for UDP the first packet that was
/// seen may be an answer, so a well-known port (RFC 6335: below 1024) counts more than the order.
fn service_of(flow: &FlowId, state: &FlowState) -> Service {
    let (local, remote) = (flow.local.port(), flow.remote.port());
    let tcp = flow.protocol == abi::IPPROTO_TCP;
    let well_known = |port: u16| port != 0 && port < 1024;
    let by_port = match (well_known(local), well_known(remote)) {
        (true, false) => Some(local),
        (false, true) => Some(remote),
        _ => None,
    };
    let by_opener = match opened_of(state) {
        Opened::Here => Some(remote),
        Opened::There => Some(local),
        Opened::Unknown => None,
    };
    let lower = local.min(remote);
    let port = if tcp { by_opener.or(by_port) } else { by_port.or(by_opener) }.unwrap_or(lower);
    match (tcp, state.hints & abi::HINT_QUIC != 0) {
        (true, _) => Service::Tcp(port),
        (false, true) => Service::Quic(port),
        (false, false) => Service::Udp(port),
    }
}

fn mute_label(flow: &FlowId, state: &FlowState, service: Service, policy: &Policy) -> Option<String> {
    let is_ours = |(port, server): &(u16, SocketAddr)| {
        flow.local.port() == *port
            && flow.remote == SocketAddr::new(server.ip().to_canonical(), server.port())
    };
    if flow.protocol == abi::IPPROTO_UDP && policy.own.iter().any(is_ours) {
        return Some(ledger::OWN.to_owned());
    }
    match state.class {
        abi::CLASS_GROUP => Some(ledger::GROUP.to_owned()),
        abi::CLASS_MUTED => Some(match policy.labels.get(usize::from(state.label)) {
            Some(label) => label.clone(),
            None => format!("label-{}", state.label),
        }),
        _ => policy.services.get(&service).map(|name| format!("service:{name}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn flow(local: &str, remote: &str, protocol: u8) -> FlowId {
        FlowId { local: local.parse().unwrap(), remote: remote.parse().unwrap(), protocol }
    }

    fn copy() -> FlowId {
        flow("10.0.0.1:40000", "10.0.0.2:9000", abi::IPPROTO_TCP)
    }

    fn state(class: u8, first: u64, burst: u64, last: u64, payload: u64) -> FlowState {
        FlowState {
            tx_packets: payload,
            tx_bytes: payload * 1_040,
            tx_payload: payload * 1_000,
            first_ns: first,
            burst_ns: burst,
            last_ns: last,
            class,
            opened: abi::OPENED_HERE,
            ..FlowState::default()
        }
    }

    fn look(flows: &mut Flows, policy: &Policy, flow: FlowId, state: FlowState, retired: bool) -> Vec<Moved> {
        flows.observe(&[FlowReading { flow, state, retired }], policy, 1, |_| "eth0".into())
    }

    fn only_activity(moved: Vec<Moved>) -> Activity {
        match moved.as_slice() {
            [Moved::Activity(activity)] => activity.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_flow_moves_what_it_counted_since_the_last_look() {
        let (mut flows, policy) = (Flows::default(), Policy::default());
        let first =
            only_activity(look(&mut flows, &policy, copy(), state(abi::CLASS_LAN, S, S, 2 * S, 3), false));
        assert_eq!((first.traffic.tx_payload, first.first_ns, first.last_ns), (3_000, S, 2 * S));
        assert_eq!(look(&mut flows, &policy, copy(), state(abi::CLASS_LAN, S, S, 2 * S, 3), false), []);
        let second =
            only_activity(look(&mut flows, &policy, copy(), state(abi::CLASS_LAN, S, S, 3 * S, 5), false));
        assert_eq!((second.traffic.tx_payload, second.first_ns, second.last_ns), (2_000, 2 * S, 3 * S));
    }

    #[test]
    fn after_a_silence_the_activity_begins_with_the_burst_not_with_the_last_look() {
        let (mut flows, policy) = (Flows::default(), Policy::default());
        look(&mut flows, &policy, copy(), state(abi::CLASS_LAN, S, S, 2 * S, 3), false);
        let burst = look(&mut flows, &policy, copy(), state(abi::CLASS_LAN, S, 9 * S, 10 * S, 5), false);
        assert_eq!(only_activity(burst).first_ns, 9 * S);
    }

    #[test]
    fn a_retired_flow_that_comes_back_is_counted_from_zero() {
        let (mut flows, policy) = (Flows::default(), Policy::default());
        look(&mut flows, &policy, copy(), state(abi::CLASS_LAN, S, S, 2 * S, 3), true);
        assert!(flows.is_empty());
        let back = look(&mut flows, &policy, copy(), state(abi::CLASS_LAN, 40 * S, 40 * S, 41 * S, 1), false);
        assert_eq!(only_activity(back).traffic.tx_payload, 1_000);
    }

    #[test]
    fn a_packet_outside_the_table_that_is_read_late_does_not_count_the_flow_twice() {
        let (mut flows, policy) = (Flows::default(), Policy::default());
        look(&mut flows, &policy, copy(), state(abi::CLASS_LAN, 2 * S, 2 * S, 3 * S, 5), false);
        let packet = FlowReading { flow: copy(), state: state(abi::CLASS_LAN, S, S, S, 1), retired: true };
        let moved = observe_unstored(&[packet], &policy, |_| "eth0".into());
        assert_eq!(only_activity(moved).traffic.tx_payload, 1_000);
        assert_eq!(
            look(&mut flows, &policy, copy(), state(abi::CLASS_LAN, 2 * S, 2 * S, 3 * S, 5), false),
            []
        );
    }

    #[test]
    fn lan_is_one_counterpart_and_internet_is_told_apart_by_service() {
        let (mut flows, policy) = (Flows::default(), Policy::default());
        let lan = only_activity(look(&mut flows, &policy, copy(), state(abi::CLASS_LAN, S, S, S, 1), false));
        assert_eq!(lan.key, Key::Lan("10.0.0.2".parse().unwrap()));
        let web = flow("10.0.0.1:40000", "198.51.100.10:443", abi::IPPROTO_UDP);
        let quic = FlowState { hints: abi::HINT_QUIC, ..state(abi::CLASS_INTERNET, S, S, S, 1) };
        let web = only_activity(look(&mut flows, &policy, web, quic, false));
        assert_eq!(web.key, Key::Internet("198.51.100.10".parse().unwrap(), Service::Quic(443)));
    }

    #[test]
    fn the_service_is_the_port_that_was_called() {
        let tcp = |opened| FlowState { opened, ..FlowState::default() };
        let ssh_in = flow("10.0.0.1:22", "10.0.0.2:50000", abi::IPPROTO_TCP);
        assert_eq!(service_of(&ssh_in, &tcp(abi::OPENED_THERE)), Service::Tcp(22));
        assert_eq!(service_of(&ssh_in, &tcp(abi::OPENED_UNKNOWN)), Service::Tcp(22));
        let high = flow("10.0.0.1:8080", "10.0.0.2:5201", abi::IPPROTO_TCP);
        assert_eq!(service_of(&high, &tcp(abi::OPENED_THERE)), Service::Tcp(8080));
        // The first packet that was seen of this DNS exchange was the answer.
        let dns = flow("10.0.0.1:50000", "192.0.2.53:53", abi::IPPROTO_UDP);
        assert_eq!(service_of(&dns, &tcp(abi::OPENED_THERE)), Service::Udp(53));
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
            match look(&mut flows, &policy, flow, state(class, S, S, S, packets), false).as_slice() {
                [Moved::Muted(label, traffic, new)] => (label.clone(), traffic.tx_packets, *new),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(label("203.0.113.1:9", "10.0.0.1:40000", abi::CLASS_MUTED, 2), ("amazon".into(), 2, 1));
        assert_eq!(label("203.0.113.1:9", "10.0.0.1:40000", abi::CLASS_MUTED, 5), ("amazon".into(), 3, 0));
        assert_eq!(label("10.0.0.53:53", "10.0.0.1:40001", abi::CLASS_LAN, 1), ("service:dns".into(), 1, 1));
        assert_eq!(label("224.0.0.251:5353", "10.0.0.1:5353", abi::CLASS_GROUP, 1), ("group".into(), 1, 1));
        assert_eq!(label("10.0.0.9:7443", "10.0.0.1:7000", abi::CLASS_LAN, 1), ("netmon".into(), 1, 1));
    }
}
