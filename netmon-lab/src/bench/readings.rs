//! What netmon counted, flow by flow. The only place of the benchmark that reads the flow tables.

use std::collections::HashMap;

use anyhow::Result;
use netmon_agent::kernel::{FlowId, FlowReading, Kernel};
use netmon_common::abi::{FlowOpened, FlowState};

/// What was counted so far.
#[derive(Debug, Default)]
pub struct Readings {
    /// Flows as they were last read.
    pub flows: HashMap<FlowId, FlowState>,
    /// "Flow opened" records by what they say of the table (`STORED` and the like).
    pub opened: u64,
    scratch: Vec<FlowReading>,
}

impl Readings {
    /// Reads every table once, as the agent does four times a second. Nothing is retired.
    ///
    /// # Errors
    /// As [`Kernel::sweep`].
    pub fn sweep(&mut self, kernel: &mut Kernel) -> Result<()> {
        self.scratch.clear();
        kernel.sweep(0, u64::MAX, &mut self.scratch)?;
        self.flows.extend(self.scratch.drain(..).map(|reading| (reading.flow, reading.state)));
        Ok(())
    }

    /// Reads the ring buffer until it is empty, as the agent does whenever something is in it.
    pub fn drain(&mut self, kernel: &mut Kernel) {
        while let Some(FlowOpened { .. }) = kernel.next_opened() {
            self.opened += 1;
        }
    }
}
