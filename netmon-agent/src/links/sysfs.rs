//! What netlink does not tell about an interface: files under `/sys/class/net` and `/proc/net`.

use std::fs;
use std::path::Path;

use super::{Backing, Link};

/// `ARPHRD_PPP`.
pub(super) const PPP: u16 = 512;

/// Looks at this network namespace's files; an interface that has gone meanwhile has nothing behind it.
pub(super) fn backing(link: &Link) -> Backing {
    // The kernel allows no name with a slash, and neither `.` nor `..`.
    let directory = Path::new("/sys/class/net").join(&link.name);
    let l2tp = || fs::read_to_string("/proc/net/pppol2tp").unwrap_or_default();
    if link.link_type == PPP && names_interface(&l2tp(), &link.name) {
        return Backing::Tunnel;
    }
    read(&directory)
}

/// True when a USB device stands behind the interface, at any distance: a Bluetooth network's device is a connection of an
/// adapter's, a modem channel's is the modem's interface.
pub(super) fn is_usb(link: &Link) -> bool {
    let directory = Path::new("/sys/class/net").join(&link.name);
    match link.backing {
        Backing::Nothing | Backing::Tunnel => false,
        Backing::ModemChannel => {
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            let mut lower =
                entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"lower_"));
            lower.any(|entry| is_below_usb(&entry.path()))
        }
        Backing::Device | Backing::SwitchConduit | Backing::VirtualMachine => is_below_usb(&directory),
    }
}

/// By the directory of an interface: is its device, or one that this is a part of, on a USB bus?
fn is_below_usb(directory: &Path) -> bool {
    let on_usb = |device: &Path| {
        let bus = fs::read_link(device.join("subsystem")).unwrap_or_default();
        bus.file_name().is_some_and(|bus| bus == "usb")
    };
    fs::canonicalize(directory.join("device")).is_ok_and(|device| device.ancestors().any(on_usb))
}

/// By the directory of an interface.
fn read(directory: &Path) -> Backing {
    // Documentation/ABI/testing/sysfs-class-net-qmi: connections are made and told apart by their mux_id.
    if directory.join("qmap/mux_id").exists() {
        return Backing::ModemChannel;
    }
    if !directory.join("device").exists() {
        return Backing::Nothing;
    }
    // Documentation/ABI/testing/sysfs-class-net-dsa: only the interface that the CPU talks to the switch by has it.
    if directory.join("dsa").exists() {
        return Backing::SwitchConduit;
    }
    let bus = fs::read_link(directory.join("device/subsystem")).unwrap_or_default();
    if bus.file_name().is_some_and(|bus| bus == "xen-backend") {
        return Backing::VirtualMachine;
    }
    Backing::Device
}

/// Each session of `/proc/net/pppol2tp` ends with a line `interface NAME`.
fn names_interface(sessions: &str, name: &str) -> bool {
    sessions.lines().any(|line| line.trim().strip_prefix("interface ") == Some(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// An interface's directory as the kernel makes it.
    fn interface(files: &[&str], bus: Option<&str>) -> Backing {
        let sys = tempfile::tempdir().unwrap();
        let directory = sys.path().join("class/net/x");
        fs::create_dir_all(&directory).unwrap();
        for file in files {
            let file = directory.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        if let Some(bus) = bus {
            let device = sys.path().join("devices/x");
            fs::create_dir_all(&device).unwrap();
            fs::create_dir_all(sys.path().join("bus").join(bus)).unwrap();
            symlink(sys.path().join("bus").join(bus), device.join("subsystem")).unwrap();
            symlink(&device, directory.join("device")).unwrap();
        }
        read(&directory)
    }

    #[test]
    fn what_stands_behind_an_interface_is_told_by_its_directory() {
        assert_eq!(interface(&[], Some("pci")), Backing::Device);
        assert_eq!(interface(&[], Some("usb")), Backing::Device);
        assert_eq!(interface(&[], None), Backing::Nothing);
        assert_eq!(interface(&["dsa/tagging"], Some("platform")), Backing::SwitchConduit);
        assert_eq!(interface(&[], Some("xen-backend")), Backing::VirtualMachine);
        assert_eq!(
            interface(&[], Some("xen")),
            Backing::Device,
            "in the virtual machine it is a network card"
        );
        assert_eq!(interface(&["qmap/mux_id"], None), Backing::ModemChannel);
    }

    #[test]
    fn a_usb_device_is_behind_an_interface_at_any_distance() {
        let sys = tempfile::tempdir().unwrap();
        let make = |device: &str, bus: Option<&str>| {
            let device = sys.path().join("devices").join(device);
            fs::create_dir_all(&device).unwrap();
            if let Some(bus) = bus {
                symlink(Path::new("../../bus").join(bus), device.join("subsystem")).unwrap();
            }
            device
        };
        let interface = |name: &str, device: &Path| {
            let directory = sys.path().join("class/net").join(name);
            fs::create_dir_all(&directory).unwrap();
            symlink(device, directory.join("device")).unwrap();
            directory
        };
        let card = make("pci0/card", Some("pci"));
        make("pci0/usb1", Some("usb"));
        let adapter = make("pci0/usb1/1-2/1-2:1.0", Some("usb"));
        let connection = make("pci0/usb1/1-3/1-3:1.0/bluetooth/hci0/hci0:256", Some("bluetooth"));
        assert!(!is_below_usb(&interface("eth0", &card)));
        assert!(is_below_usb(&interface("usb0", &adapter)));
        assert!(is_below_usb(&interface("bnep0", &connection)));
        assert!(!is_below_usb(&sys.path().join("class/net/gone")));
    }

    #[test]
    fn an_l2tp_session_names_its_interface() {
        let sessions = "PPPoL2TP driver info, V2.0\nTUNNEL name, user-data-ok session-count\n\nTUNNEL '' Y 1\n\
                        \x20 SESSION '' C0A80001/1701 0001/0001 -> 0001/0001 1 Y\n   interface ppp1\n";
        assert!(names_interface(sessions, "ppp1"));
        assert!(!names_interface(sessions, "ppp") && !names_interface(sessions, "ppp0"));
        assert!(!names_interface("", ""));
    }
}
