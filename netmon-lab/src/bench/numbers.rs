//! What is said of the same thing measured several times.

use serde::Serialize;

/// Median and least of some measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The middle one; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// The least: the one that the rest of the machine disturbed least, where less is better.
    pub least: f64,
}

impl Summary {
    /// `None` for no measurement. Those that are not numbers are left out.
    pub fn of(measured: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = measured.into_iter().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let least = *sorted.first()?;
        let half = sorted.len() / 2;
        let median =
            if sorted.len() % 2 == 1 { sorted[half] } else { f64::midpoint(sorted[half - 1], sorted[half]) };
        Some(Self { median, least })
    }
}

/// The middle of some measurements; not a number when there is none.
pub fn median(measured: impl IntoIterator<Item = f64>) -> f64 {
    Summary::of(measured).map_or(f64::NAN, |summary| summary.median)
}

/// The median of `a[n] / b[n]`: what was measured in the same round is compared with each other, so that whatever
/// slowed down the whole round cancels out.
pub fn median_ratio(a: &[f64], b: &[f64]) -> f64 {
    median(a.iter().zip(b).map(|(a, b)| a / b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_two_in_the_middle() {
        assert_eq!(Summary::of([4.0, 1.0, 3.0, 2.0]), Some(Summary { median: 2.5, least: 1.0 }));
        assert_eq!(Summary::of([9.0, 1.0, 5.0]), Some(Summary { median: 5.0, least: 1.0 }));
        assert_eq!(Summary::of([f64::NAN]), None);
    }

    #[test]
    fn rounds_are_compared_with_themselves() {
        // The second round was three times as slow for both.
        assert_eq!(median_ratio(&[1.0, 3.0, 1.0], &[2.0, 6.0, 2.0]), 0.5);
    }
}
