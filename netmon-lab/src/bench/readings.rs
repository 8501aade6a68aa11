//! What netmon counted, flow by flow. The only place of the benchmark that reads the flow tables.

use std::collections::HashMap;

use netmon_agent::clock::Now;
use netmon_agent::kernel::{FlowDelta, FlowId, Kernel};

/// What one flow has moved so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Packets sent.
    pub tx_packets: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// One of the `CLASS_` constants.
    pub class: u8,
    /// Label of the muted prefix.
    pub label: u16,
}

/// What was counted so far.
#[derive(Debug, Default)]
pub struct Readings {
    /// Sums of all that was read.
    pub flows: HashMap<FlowId, Flow>,
    /// Keep no sums: with a million flows they would be in the way of the programs' own memory.
    pub discard: bool,
    scratch: Vec<FlowDelta>,
}

impl Readings {
    /// Reads the tables once, as the agent does again and again.
    pub fn sweep(&mut self, kernel: &mut Kernel) {
        kernel.sweep(Now::read().boot_ns, &mut self.scratch);
        self.take_in();
    }

    /// Reads all that there is, as the agent does at its end.
    pub fn sweep_all(&mut self, kernel: &mut Kernel) {
        self.drain(kernel);
        kernel.sweep_all(Now::read().boot_ns, &mut self.scratch);
        self.take_in();
    }

    /// Empties the ring buffer, as the agent does whenever something is in it.
    pub fn drain(&mut self, kernel: &mut Kernel) {
        kernel.take_records(Now::read().boot_ns, &mut self.scratch);
        self.take_in();
    }

    fn take_in(&mut self) {
        let mut deltas = std::mem::take(&mut self.scratch);
        if !self.discard {
            self.add(deltas.iter().copied());
        }
        deltas.clear();
        self.scratch = deltas;
    }

    /// Adds what was read elsewhere.
    pub fn add(&mut self, deltas: impl IntoIterator<Item = FlowDelta>) {
        for FlowDelta { flow, moved, class, label, .. } in deltas {
            let sum = self.flows.entry(flow).or_default();
            sum.tx_packets += moved.tx_packets;
            sum.rx_packets += moved.rx_packets;
            sum.rx_bytes += moved.rx_bytes;
            (sum.class, sum.label) = (class, label);
        }
    }
}
