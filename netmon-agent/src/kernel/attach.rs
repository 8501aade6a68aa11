//! Attaching to one interface, and leaving it as it was.

use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::FdLink,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
        xdp::{XdpLink, XdpMode},
    },
};
use netmon_common::{abi::programs, model::Hook, raw::Escaped};

use super::{
    KernelError, Mode,
    load::{TC_PROGRAMS, tc_program, xdp_program},
    netlink, sys,
};

/// First of all filters, as TCX programs are.
const CLSACT_PRIORITY: u16 = 1;
/// "nm". A fixed handle: a second filter of ours in the same place is refused by the kernel.
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 0x6e6d);

/// An interface that is watched. The links detach when they are dropped.
#[derive(Debug)]
pub(super) struct Attached {
    pub hook: Hook,
    pub interface: String,
    ifindex: u32,
    /// The clsact qdisc is ours.
    qdisc: bool,
    tc: Vec<Tc>,
    xdp: Option<Xdp>,
}

/// A TC program that hangs on an interface.
#[derive(Debug)]
struct Tc {
    direction: TcAttachType,
    /// Kernel's number of the program.
    program: u32,
    link: SchedClassifierLink,
}

/// The XDP program that hangs on an interface.
#[derive(Debug)]
struct Xdp {
    /// Kernel's number of the program.
    program: u32,
    _link: XdpLink,
}

impl Attached {
    /// Do all our programs still hang on the interface? True when the interface has gone.
    pub fn is_complete(&self) -> Result<bool, KernelError> {
        let link = match netlink::link(self.ifindex) {
            Err(KernelError::NoSuchInterface { .. }) => return Ok(true),
            link => link?,
        };
        if self.xdp.as_ref().is_some_and(|xdp| !link.xdp.contains(&xdp.program)) {
            return Ok(false);
        }
        for Tc { direction, program, link } in &self.tc {
            let is_tcx = <&FdLink>::try_from(link).is_ok();
            let egress = *direction == TcAttachType::Egress;
            let programs = if is_tcx {
                sys::tcx_programs(self.ifindex, egress).map_err(|source| KernelError::ListPrograms {
                    interface: self.interface.clone(),
                    source,
                })?
            } else {
                netlink::filters(self.ifindex, egress)?.iter().map(|filter| filter.program).collect()
            };
            if !programs.contains(program) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Detaches, and removes the qdisc if it was ours and nobody else uses it.
    pub fn detach(mut self) -> Result<(), KernelError> {
        self.tc.clear();
        self.xdp = None;
        if self.qdisc { netlink::remove_empty_clsact(self.ifindex) } else { Ok(()) }
    }
}

/// What stands in front of the IP header on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Ethernet,
    Ip,
}

impl Layer {
    /// By `ARPHRD_` number (linux/if_arp.h).
    fn of(link_type: u16) -> Option<Self> {
        match link_type {
            // ARPHRD_ETHER, ARPHRD_LOOPBACK
            1 | 772 => Some(Self::Ethernet),
            // ARPHRD_SLIP and its kin, _PPP, _RAWIP, _TUNNEL, _TUNNEL6, _SIT, _NONE (tun, WireGuard)
            256..=259 | 264 | 512 | 519 | 768 | 769 | 776 | 0xfffe => Some(Self::Ip),
            _ => None,
        }
    }
}

/// Attaches to both directions of an interface, or to none.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    mode: Mode,
    tcx: &mut bool,
    ifindex: u32,
) -> Result<Attached, KernelError> {
    let netlink::Link { name: interface, link_type, .. } = netlink::link(ifindex)?;
    let Some(layer) = Layer::of(link_type) else {
        return Err(KernelError::UnsupportedLink { interface, link_type });
    };
    // Filters outlive their process. An agent that was killed may have left some.
    remove_stale_filters(&interface, ifindex)?;
    let mut attached =
        Attached { hook: Hook::Tcx, interface, ifindex, qdisc: false, tc: Vec::new(), xdp: None };
    match attach_all(ebpf, mode, tcx, layer, &mut attached) {
        Ok(()) => Ok(attached),
        Err(error) => {
            // The error that made us give up is the one to report.
            let _ = attached.detach();
            Err(error)
        }
    }
}

fn attach_all(
    ebpf: &mut Ebpf,
    mode: Mode,
    tcx: &mut bool,
    layer: Layer,
    attached: &mut Attached,
) -> Result<(), KernelError> {
    let (ingress, egress) = match layer {
        Layer::Ethernet => (programs::TC_INGRESS, programs::TC_EGRESS),
        Layer::Ip => (programs::TC_L3_INGRESS, programs::TC_L3_EGRESS),
    };
    let xdp = mode == Mode::Xdp && layer == Layer::Ethernet;
    attach_tc(ebpf, egress, TcAttachType::Egress, tcx, attached)?;
    if xdp {
        attached.xdp = Some(attach_xdp(ebpf, attached)?);
    } else {
        attach_tc(ebpf, ingress, TcAttachType::Ingress, tcx, attached)?;
    }
    attached.hook = match (xdp, *tcx) {
        (false, true) => Hook::Tcx,
        (false, false) => Hook::Clsact,
        (true, true) => Hook::XdpTcx,
        (true, false) => Hook::XdpClsact,
    };
    Ok(())
}

fn attach_tc(
    ebpf: &mut Ebpf,
    name: &'static str,
    direction: TcAttachType,
    tcx: &mut bool,
    attached: &mut Attached,
) -> Result<(), KernelError> {
    let program = tc_program(ebpf, name)?;
    let failed = |source| attach_error(name, &attached.interface, source);
    let number = program.info().map_err(failed)?.id();
    if *tcx {
        let first = TcAttachOptions::TcxOrder(LinkOrder::first());
        match program.attach_with_options(&attached.interface, direction, first) {
            Ok(id) => {
                let link = program.take_link(id).map_err(failed)?;
                attached.tc.push(Tc { direction, program: number, link });
                return Ok(());
            }
            // Kernels before 6.6 do not know the attach type.
            Err(error) if errno(&error) == Some(libc::EINVAL) => *tcx = false,
            Err(error) => return Err(failed(error)),
        }
    }
    match tc::qdisc_add_clsact(&attached.interface) {
        Ok(()) => attached.qdisc = true,
        // There is one already.
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
        Err(error) => return Err(failed(error.into())),
    }
    let link = attach_filter(program, &attached.interface, direction).map_err(failed)?;
    attached.tc.push(Tc { direction, program: number, link });
    Ok(())
}

fn attach_filter(
    program: &mut SchedClassifier,
    interface: &str,
    direction: TcAttachType,
) -> Result<SchedClassifierLink, ProgramError> {
    let options = NlOptions { priority: CLSACT_PRIORITY, handle: CLSACT_HANDLE, classid: None };
    let id = program.attach_with_options(interface, direction, TcAttachOptions::Netlink(options))?;
    program.take_link(id)
}

/// In the driver where it can; else in the kernel's generic hook, as virtual machines and many Wi-Fi cards need.
fn attach_xdp(ebpf: &mut Ebpf, attached: &Attached) -> Result<Xdp, KernelError> {
    let program = xdp_program(ebpf)?;
    let busy = |error: &ProgramError| matches!(errno(error), Some(libc::EBUSY | libc::EEXIST));
    let id = match program.attach_to_if_index(attached.ifindex, XdpMode::Default) {
        Err(error) if !busy(&error) => program.attach_to_if_index(attached.ifindex, XdpMode::Skb),
        result => result,
    };
    let failed = |source| attach_error(programs::XDP_INGRESS, &attached.interface, source);
    let id = match id {
        Err(error) if busy(&error) => {
            return Err(KernelError::XdpBusy { interface: attached.interface.clone() });
        }
        id => id.map_err(failed)?,
    };
    let link = program.take_link(id).map_err(failed)?;
    Ok(Xdp { program: program.info().map_err(failed)?.id(), _link: link })
}

/// Ours are known by name and place. What else hangs there, of whatever kind, is not touched.
fn remove_stale_filters(interface: &str, ifindex: u32) -> Result<(), KernelError> {
    for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
        let filters = netlink::filters(ifindex, direction == TcAttachType::Egress)?;
        let Some(stale) = filters.iter().find(|filter| TC_PROGRAMS.contains(&filter.name.as_str())) else {
            continue;
        };
        let link = SchedClassifierLink::attached(interface, direction, CLSACT_PRIORITY, CLSACT_HANDLE, None);
        link.map_err(ProgramError::from).and_then(aya::programs::Link::detach).map_err(|source| {
            KernelError::StaleFilters { interface: interface.to_owned(), source: Box::new(source) }
        })?;
        let interface = Escaped(interface.as_bytes());
        tracing::warn!(%interface, name = stale.name, "removed a filter of an agent that died");
    }
    Ok(())
}

fn attach_error(program: &'static str, interface: &str, source: ProgramError) -> KernelError {
    // The interface may have gone between our question and this.
    KernelError::Attach { program, interface: interface.to_owned(), source: Box::new(source) }
}

fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        ProgramError::XdpError(aya::programs::xdp::XdpError::NetlinkError(error))
        | ProgramError::TcError(TcError::NetlinkError(error))
        | ProgramError::NetlinkError(error) => error.raw_os_error(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_read_by_its_link_type() {
        assert_eq!(Layer::of(1), Some(Layer::Ethernet));
        assert_eq!(Layer::of(0xfffe), Some(Layer::Ip));
        assert_eq!(Layer::of(803), None, "a Wi-Fi card in monitor mode carries radiotap headers");
    }
}
