//! What is mounted, by the kernel's list.
//!
//! Pure: reads the text of `/proc/self/mountinfo` (proc_pid_mountinfo(5); kernel: `show_mountinfo` in
//! fs/proc_namespace.c). Whoever may mount chooses most of it: mount points, sources and types are bytes, bounded.

use std::fmt::{self, Display, Formatter};

/// The number of a block device, or of a file system without one (major 0), as `st_dev` has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber {
    /// Major number; 0: no block device.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl DeviceNumber {
    /// From the text that the kernel writes: `8:17`.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (major, minor) = std::str::from_utf8(text).ok()?.split_once(':')?;
        Some(Self { major: decimal(major)?, minor: decimal(minor)? })
    }
}

impl Display for DeviceNumber {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// One mount. The same file system may be mounted several times.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// The kernel's number of this mount. It is given again after the mount is gone.
    pub id: u32,
    /// `st_dev` of the files on it.
    pub device: DeviceNumber,
    /// What is mounted, as a path inside of the file system: `/` unless it is a bind mount or a subvolume.
    pub root: Vec<u8>,
    /// Where, as a path below the agent's own root directory.
    pub point: Vec<u8>,
    /// Type of the file system.
    pub file_system: Vec<u8>,
    /// What whoever mounted it gave as its source. For most file systems nobody checks that.
    pub source: Vec<u8>,
    /// True when nothing can be written through this mount.
    pub read_only: bool,
    /// True when nothing can be written to the file system, through whichever mount.
    pub file_system_read_only: bool,
}

/// All mounts of the agent's mount namespace, in the kernel's order: a later one at the same place hides an earlier one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    /// At most [`Mounts::MAX`].
    pub list: Vec<Mount>,
    /// Lines that are not what kernels write, or too many; one where the list was cut.
    pub refused: u64,
}

impl Mounts {
    /// Most mounts that are looked at. A PC has some fifty, one with many containers some thousands; the kernel allows
    /// 100,000 (`fs.mount-max`).
    pub const MAX: usize = 16_384;

    /// Longest line, in bytes: two paths of 4 KiB with every byte escaped (four for one), and options of a page.
    pub const MAX_LINE: usize = 64 * 1024;

    /// Reads the list's text.
    pub fn parse(text: &[u8]) -> Self {
        let mut mounts = Self::default();
        // The kernel ends every line: of a list that is too long there may be more, and its last line is not whole.
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let (text, cut) = text.split_at(whole);
        mounts.refused += u64::from(!cut.is_empty());
        for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            let room = mounts.list.len() < Self::MAX && line.len() <= Self::MAX_LINE;
            match room.then(|| Mount::parse(line)).flatten() {
                Some(mount) => mounts.list.push(mount),
                None => mounts.refused += 1,
            }
        }
        mounts
    }

    /// The mount that holds the file of this absolute path.
    pub fn holding(&self, path: &[u8]) -> Option<&Mount> {
        let below = |mount: &&Mount| match path.strip_prefix(mount.point.as_slice()) {
            Some(rest) => rest.is_empty() || rest.starts_with(b"/") || mount.point.ends_with(b"/"),
            None => false,
        };
        // The last of the longest.
        self.list.iter().filter(below).max_by_key(|mount| mount.point.len())
    }
}

impl Mount {
    /// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`: between the sixth field and the
    /// dash stand any number of optional fields.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|&byte| byte == b' ');
        let id = decimal(std::str::from_utf8(fields.next()?).ok()?)?;
        let _parent = fields.next()?;
        let device = DeviceNumber::parse(fields.next()?)?;
        let root = unescaped(fields.next()?);
        let point = unescaped(fields.next()?);
        let options = fields.next()?;
        fields.find(|field| *field == b"-")?;
        let file_system = unescaped(fields.next()?);
        let source = unescaped(fields.next()?);
        let super_options = fields.next()?;
        // Absolute always; without this check an empty one would hold every file.
        point.starts_with(b"/").then(|| Self {
            id,
            device,
            root,
            point,
            file_system,
            source,
            read_only: is_read_only(options),
            file_system_read_only: is_read_only(super_options),
        })
    }
}

/// The kernel writes `ro` or `rw` as the first option.
fn is_read_only(options: &[u8]) -> bool {
    options.split(|&byte| byte == b',').next() == Some(b"ro")
}

fn decimal(text: &str) -> Option<u32> {
    // parse() would take a sign, too.
    text.parse().ok().filter(|_| !text.starts_with('+'))
}

/// The kernel writes blanks, line ends, backslashes and `#` as a backslash and three octal digits (`mangle_path`).
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        match rest {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', behind @ ..] if byte == b'\\' => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = behind;
            }
            _ => bytes.push(byte),
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> Mount {
        let mut mounts = Mounts::parse(format!("{line}\n").as_bytes());
        assert_eq!((mounts.list.len(), mounts.refused), (1, 0), "{line}");
        mounts.list.remove(0)
    }

    #[test]
    fn a_line_is_read_by_its_fields_whatever_optional_ones_it_has() {
        let expected = Mount {
            id: 36,
            device: DeviceNumber { major: 8, minor: 17 },
            root: b"/sub".into(),
            point: b"/media/USB".into(),
            file_system: b"vfat".into(),
            source: b"/dev/sdb1".into(),
            read_only: false,
            file_system_read_only: true,
        };
        for optional in ["", "shared:1 ", "master:1 propagate_from:2 unbindable new:thing "] {
            let line = format!("36 35 8:17 /sub /media/USB rw,noatime {optional}- vfat /dev/sdb1 ro,x=1\n");
            assert_eq!(one(&line), expected);
        }
        assert!(one("1 1 8:1 / / ro - ext4 /dev/sda1 rw\n").read_only);
        assert!(!one("1 1 8:1 / / rw,ro - ext4 /dev/sda1 rw\n").read_only);
    }

    #[test]
    fn what_the_kernel_escaped_is_as_it_was_and_nothing_else_is_touched() {
        let mount = one(r"1 1 8:1 / /a\040b\011\012\134040\043 rw - fuse \134\9\40 rw");
        assert_eq!(mount.point, b"/a b\t\n\\040#");
        assert_eq!(mount.source, br"\\9\40");
        assert_eq!(unescaped(br"\377\400"), b"\xff\\400");
    }

    #[test]
    fn a_source_may_be_empty() {
        assert_eq!(one("1 1 0:5 / /mnt rw - tmpfs  rw").source, b"");
    }

    #[test]
    fn what_is_no_mount_is_refused_and_counted() {
        for line in [
            "x 1 8:1 / / rw - ext4 /dev/sda1 rw",
            "1 1 8 / / rw - ext4 /dev/sda1 rw",
            "1 1 +8:1 / / rw - ext4 /dev/sda1 rw",
            "1 1 8:4294967296 / / rw - ext4 /dev/sda1 rw",
            "1 1 8:1 / mnt rw - ext4 /dev/sda1 rw",
            "1 1 8:1 /  rw - ext4 /dev/sda1 rw",
            "1 1 8:1 / / rw ext4 /dev/sda1 rw",
            "1 1 8:1 / / rw - ext4 /dev/sda1",
            "1",
        ] {
            let text = format!("{line}\n");
            assert_eq!(Mounts::parse(text.as_bytes()), Mounts { list: vec![], refused: 1 }, "{line}");
        }
        assert_eq!(Mounts::parse(b"\n\xff\n\n"), Mounts { list: vec![], refused: 1 });
    }

    #[test]
    fn the_list_is_bounded_and_what_does_not_fit_is_counted() {
        let text = "1 1 8:1 / / rw - ext4 /dev/sda1 rw\n".repeat(Mounts::MAX + 3);
        let mounts = Mounts::parse(text.as_bytes());
        assert_eq!((mounts.list.len(), mounts.refused), (Mounts::MAX, 3));
        let long = format!("1 1 8:1 / /{} rw - ext4 /dev/sda1 rw\n", "a".repeat(Mounts::MAX_LINE));
        assert_eq!(Mounts::parse(long.as_bytes()).refused, 1);
        let cut =
            Mounts::parse(b"1 1 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 8:17 / /media/A rw - vfat /dev/sdb1 rw");
        assert_eq!((cut.list.len(), cut.refused), (1, 1));
    }

    #[test]
    fn a_file_is_held_by_the_nearest_mount_and_there_by_the_last() {
        let mounts = Mounts::parse(
            b"1 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
              2 1 8:17 / /media/A rw - vfat /dev/sdb1 rw\n\
              3 1 8:33 / /media/A rw - vfat /dev/sdc1 rw\n\
              4 1 8:49 / /media rw - vfat /dev/sdd1 rw\n",
        );
        let id = |path: &[u8]| mounts.holding(path).map(|mount| mount.id);
        assert_eq!(id(b"/media/A/image (deleted)"), Some(3));
        assert_eq!(id(b"/media/A"), Some(3));
        assert_eq!(id(b"/media/AB"), Some(4));
        assert_eq!(id(b"/etc/passwd"), Some(1));
        assert_eq!(id(b"(unreachable)/x"), None);
    }
}
