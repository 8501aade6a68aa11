//! A phone: the kernel's own gadget side, plugged into a bus that leads to this kernel (dummy_hcd, configfs).
//!
//! It shares its network (RNDIS), has a modem's port (ACM), and shows two slots for cards, the first with a card of 8 MiB.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use netmon_common::model::UsbDevice;
use netmon_lab::wait;

/// Documentation/usb/gadget_configfs.rst
const CONFIGFS: &str = "/sys/kernel/config";
const GADGET: &str = "/sys/kernel/config/usb_gadget/phone";

/// What the phone is, in the order of its interfaces.
const FUNCTIONS: [&str; 3] = ["rndis.0", "acm.0", "mass_storage.0"];

/// The phone, not plugged in yet.
pub struct Phone;

impl Phone {
    pub fn new() -> Self {
        for module in ["dummy_hcd", "libcomposite", "usb_f_acm", "usb_f_mass_storage", "usb_f_rndis"] {
            assert!(Command::new("modprobe").arg(module).status().unwrap().success(), "{module}");
        }
        if !Path::new(CONFIGFS).join("usb_gadget").exists() {
            let status = Command::new("mount").args(["-t", "configfs", "none", CONFIGFS]).status().unwrap();
            assert!(status.success());
        }
        let phone = Self;
        phone.make("", &[("idVendor", "0x18d1"), ("idProduct", "0x4ee4")]);
        phone.make(
            "strings/0x409",
            &[("manufacturer", "Google"), ("product", "Pixel 7"), ("serialnumber", "28091FDH2000AB")],
        );
        phone.make("configs/c.1", &[]);
        phone.make(
            "functions/rndis.0",
            &[("host_addr", "52:54:00:00:05:01"), ("dev_addr", "52:54:00:00:05:02")],
        );
        phone.make("functions/acm.0", &[]);
        phone.make("functions/mass_storage.0/lun.0", &[("removable", "1")]);
        phone.make("functions/mass_storage.0/lun.1", &[("removable", "1")]);
        for function in FUNCTIONS {
            let to = phone.path("configs/c.1").join(function);
            symlink(phone.path("functions").join(function), to).unwrap();
        }
        phone.put_in(0, Some(8 << 20));
        phone
    }

    pub fn plug(&self) {
        fs::write(self.path("UDC"), "dummy_udc.0").unwrap();
    }

    pub fn unplug(&self) {
        fs::write(self.path("UDC"), "\n").unwrap();
    }

    /// Puts a card of this size into a slot, or takes out what is in there although the host may use it.
    pub fn put_in(&self, slot: u8, bytes: Option<u64>) {
        let lun = self.path(&format!("functions/mass_storage.0/lun.{slot}"));
        match bytes {
            Some(bytes) => {
                let card = format!("/run/card-{bytes}");
                File::create(&card).unwrap().set_len(bytes).unwrap();
                fs::write(lun.join("file"), card).unwrap();
            }
            None if lun.join("forced_eject").exists() => fs::write(lun.join("forced_eject"), "1").unwrap(),
            // Older kernels refuse while somebody looks into the card: udev, at first.
            None => wait::until(Duration::from_secs(60), "the card to come out", || {
                fs::write(lun.join("file"), "\n").ok()
            })
            .unwrap(),
        }
    }

    /// Resets the port as drivers and programs do it.
    pub fn reset(&self, device: &UsbDevice) {
        let node = format!("/dev/bus/usb/{:03}/{:03}", device.bus, device.number);
        let node = File::options().write(true).open(node).unwrap();
        /// `USBDEVFS_RESET`, `_IO('U', 20)` (linux/usbdevice_fs.h)
        const RESET: rustix::ioctl::Opcode = 0x5514;
        // SAFETY: the request takes no argument.
        unsafe { rustix::ioctl::ioctl(node, rustix::ioctl::NoArg::<RESET>::new()) }.unwrap();
    }

    /// Takes the drivers away from all its interfaces, and gives them back.
    pub fn rebind(&self, device: &UsbDevice) {
        let authorized = format!("/sys{}/authorized", device.devpath.escaped());
        for value in ["0", "1"] {
            fs::write(&authorized, value).unwrap();
        }
    }

    fn path(&self, below: &str) -> PathBuf {
        Path::new(GADGET).join(below)
    }

    fn make(&self, below: &str, values: &[(&str, &str)]) {
        let directory = self.path(below);
        fs::create_dir_all(&directory).unwrap();
        for (name, value) in values {
            fs::write(directory.join(name), value).unwrap_or_else(|error| panic!("{below}/{name}: {error}"));
        }
    }
}

impl Drop for Phone {
    /// A test must not leave a phone for the next one, however it ended; so what fails here is what is not there.
    fn drop(&mut self) {
        let _ = fs::write(self.path("UDC"), "\n");
        for function in FUNCTIONS {
            let _ = fs::remove_file(self.path("configs/c.1").join(function));
        }
        for directory in ["functions/mass_storage.0/lun.1", "configs/c.1", "strings/0x409", ""] {
            if directory.is_empty() {
                for function in FUNCTIONS {
                    let _ = fs::remove_dir(self.path("functions").join(function));
                }
            }
            let _ = fs::remove_dir(self.path(directory));
        }
    }
}
