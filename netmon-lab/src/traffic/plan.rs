//! What to send on a connection, with pauses.

use std::str::FromStr;
use std::time::Duration;

use super::MAX_BYTES;

/// What to send on one connection, step by step: `1MB,1500ms,1MB`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan(pub Vec<Step>);

/// One step of a [`Plan`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send this many bytes.
    Send(u64),
    /// Send nothing for this long.
    Pause(Duration),
}

/// A step that cannot be meant.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// Not a number with a unit.
    #[error("`{0}` is neither a size (B, kB, MB) nor a pause (ms)")]
    Step(String),
    /// More than a generator may send.
    #[error("a plan of {0} bytes is longer than the limit of {MAX_BYTES}")]
    TooLong(u64),
}

impl FromStr for Plan {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let plan = Self(text.split(',').map(step).collect::<Result<_, _>>()?);
        match plan.bytes() {
            bytes if bytes > MAX_BYTES => Err(PlanError::TooLong(bytes)),
            _ => Ok(plan),
        }
    }
}

impl Plan {
    /// Bytes of all steps.
    pub fn bytes(&self) -> u64 {
        let sizes = self.0.iter().map(|step| match step {
            Step::Send(bytes) => *bytes,
            Step::Pause(_) => 0,
        });
        sizes.fold(0, u64::saturating_add)
    }
}

fn step(text: &str) -> Result<Step, PlanError> {
    let bad = || PlanError::Step(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let factor = match unit {
        "ms" => return Ok(Step::Pause(Duration::from_millis(number))),
        "B" => 1,
        "kB" => 1_000,
        "MB" => 1_000_000,
        _ => return Err(bad()),
    };
    Ok(Step::Send(number.saturating_mul(factor)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_pauses_follow_each_other() {
        let plan: Plan = "1MB,1500ms,20kB,7B".parse().unwrap();
        let pause = Duration::from_millis(1_500);
        assert_eq!(plan.0, [Step::Send(1_000_000), Step::Pause(pause), Step::Send(20_000), Step::Send(7)]);
        assert_eq!(plan.bytes(), 1_020_007);
    }

    #[test]
    fn what_has_no_unit_or_no_bound_is_refused() {
        for text in ["", "12", "MB", "1 MB", "1MB,", "-1B", "1s"] {
            assert!(matches!(text.parse::<Plan>(), Err(PlanError::Step(_))), "{text:?}");
        }
        assert!(matches!("1001MB".parse::<Plan>(), Err(PlanError::TooLong(_))));
        assert!(matches!("18446744073709551615MB,1MB".parse::<Plan>(), Err(PlanError::TooLong(_))));
    }
}
