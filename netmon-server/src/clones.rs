//! Is an identity used by two machines? Pure.

use std::collections::VecDeque;

/// Processes that are remembered of an agent: nobody connects so often before the agent that was pushed aside is back.
const REMEMBERED: usize = 256;

/// The processes that called with one agent's key: each names itself by a random number and counts its connections.
#[derive(Debug, Default)]
pub struct Callers {
    newest: Option<(u64, u32)>,
    before: VecDeque<u64>,
}

impl Callers {
    /// A process called. True when that shows that two of them live: a process that another one followed does not come
    /// back, and none counts backwards (two copies of one virtual machine do).
    pub fn is_clone(&mut self, instance: u64, connect: u32) -> bool {
        let Some((newest, count)) = self.newest.replace((instance, connect)) else { return false };
        if newest == instance {
            return connect <= count;
        }
        if self.before.len() == REMEMBERED {
            self.before.pop_front();
        }
        self.before.push_back(newest);
        self.before.contains(&instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(calls: &[(u64, u32)]) -> Vec<bool> {
        let mut callers = Callers::default();
        calls.iter().map(|(instance, connect)| callers.is_clone(*instance, *connect)).collect()
    }

    #[test]
    fn a_process_that_reconnects_and_one_that_follows_are_no_clones() {
        assert_eq!(verdicts(&[(1, 1), (1, 2), (1, 5), (2, 1), (3, 1)]), [false; 5]);
    }

    #[test]
    fn a_process_that_comes_back_behind_another_one_is_a_clone_and_so_is_the_other_then() {
        assert_eq!(verdicts(&[(1, 1), (2, 1), (1, 2), (2, 2)]), [false, false, true, true]);
    }

    #[test]
    fn two_copies_of_one_process_count_the_same() {
        assert_eq!(verdicts(&[(1, 7), (1, 8), (1, 8)]), [false, false, true]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut callers = Callers::default();
        for instance in 0..10_000 {
            callers.is_clone(instance, 1);
        }
        assert_eq!(callers.before.len(), REMEMBERED);
    }
}
