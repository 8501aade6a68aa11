//! Which numbers CPUs can have.

use std::{fs, io};

use super::KernelError;

/// Ranges of the CPUs that this machine can ever have, as `0-3,8-11` (Linux, Documentation/admin-guide/cputopology.rst).
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// One more than the highest number that a CPU of this machine can have.
pub(super) fn count() -> Result<usize, KernelError> {
    let error = |source| KernelError::Cpus { file: POSSIBLE, source };
    let list = fs::read_to_string(POSSIBLE).map_err(error)?;
    let highest = highest(&list).ok_or_else(|| error(io::ErrorKind::InvalidData.into()))?;
    Ok(highest + 1)
}

/// The ranges are in order.
fn highest(list: &str) -> Option<usize> {
    list.trim_end().rsplit([',', '-']).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_number_counts_whatever_is_missing_below() {
        for (list, number) in [("0\n", 0), ("0-1\n", 1), ("0-127\n", 127), ("0-3,8-11\n", 11), ("0,5\n", 5)] {
            assert_eq!(highest(list), Some(number), "{list:?}");
        }
        assert_eq!((highest(""), highest("0-\n"), highest("none")), (None, None, None));
        assert!(count().unwrap() >= std::thread::available_parallelism().unwrap().get());
    }
}
