//! In which order the packets of many flows come.

use clap::ValueEnum;
use fastrand::Rng;
use serde::Serialize;

use super::shared::{CHUNK, MAX_CHUNKS, MAX_FLOWS};

/// Most packets before the order starts again.
pub const MAX_LENGTH: usize = CHUNK * MAX_CHUNKS;
/// Fewest: with less the packet source's own memory would be in the nearest cache, and that of others farther away.
const MIN_LENGTH: usize = 1 << 16;

/// An order of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// One flow after the other.
    Sequential,
    /// Each packet is of any flow: the worst that can happen to a cache.
    Random,
    /// As on a PC: some flows have most of the packets (Zipf, exponent 1), and a flow's packets come in bursts of 1 to
    /// 16.
    Bursty,
}

impl Order {
    /// The numbers of the flows, packet by packet; a power of two of them, so that the end joins the beginning. The
    /// same arguments give the same order.
    ///
    /// In random order the length is four times the number of flows, where that fits: 98 of 100 flows are in it.
    ///
    /// # Panics
    /// When `flows` is 0 or above [`MAX_FLOWS`].
    pub fn flows(self, flows: u32) -> Vec<u32> {
        assert!((1..=MAX_FLOWS).contains(&flows), "1 to {MAX_FLOWS} flows can be told apart, not {flows}");
        let passes = if self == Self::Sequential { 1 } else { 4 };
        let length = (flows as usize * passes).next_power_of_two().clamp(MIN_LENGTH, MAX_LENGTH);
        let mut random = Rng::with_seed(flows.into());
        match self {
            Self::Sequential => (0..flows).cycle().take(length).collect(),
            Self::Random => (0..length).map(|_| random.u32(..flows)).collect(),
            Self::Bursty => {
                let zipf = Zipf::new(flows);
                let mut order = Vec::with_capacity(length + LONGEST_BURST as usize);
                while order.len() < length {
                    let flow = zipf.draw(&mut random);
                    let burst = 1 + random.u32(..LONGEST_BURST);
                    order.extend((0..burst).map(|_| flow));
                }
                order.truncate(length);
                order
            }
        }
    }
}

const LONGEST_BURST: u32 = 16;

/// Draws flow `n` with a probability in proportion to 1 / (n + 1).
struct Zipf {
    /// Sums of the weights up to each flow.
    sums: Vec<f64>,
}

impl Zipf {
    fn new(flows: u32) -> Self {
        let weights = (1..=flows).map(|rank| 1.0 / f64::from(rank));
        let sums = weights.scan(0.0, |sum, weight| {
            *sum += weight;
            Some(*sum)
        });
        Self { sums: sums.collect() }
    }

    fn draw(&self, random: &mut Rng) -> u32 {
        let point = random.f64() * self.sums.last().copied().unwrap_or_default();
        self.sums.partition_point(|sum| *sum <= point).min(self.sums.len() - 1) as u32
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn counts(order: &[u32]) -> BTreeMap<u32, u32> {
        let mut counts = BTreeMap::new();
        order.iter().for_each(|flow| *counts.entry(*flow).or_default() += 1);
        counts
    }

    #[test]
    fn every_order_has_the_length_of_a_power_of_two_and_only_flows_that_there_are() {
        for order in [Order::Sequential, Order::Random, Order::Bursty] {
            for flows in [1, 3, 1_000, 70_000] {
                let numbers = order.flows(flows);
                assert!(numbers.len().is_power_of_two() && numbers.len() >= MIN_LENGTH);
                assert!(numbers.iter().all(|number| *number < flows), "{order:?} {flows}");
            }
        }
    }

    #[test]
    fn a_sequence_has_every_flow_before_one_comes_again() {
        let numbers = Order::Sequential.flows(100_000);
        assert!(numbers[..100_000].iter().copied().eq(0..100_000));
    }

    #[test]
    fn a_random_order_has_nearly_all_flows_about_equally_often() {
        let counts = counts(&Order::Random.flows(16_384));
        assert!(counts.len() > 16_384 * 97 / 100, "{}", counts.len());
        assert!(counts.values().all(|count| *count < 30));
    }

    #[test]
    fn a_bursty_order_has_runs_and_favourites() {
        let numbers = Order::Bursty.flows(16_384);
        let changes = numbers.windows(2).filter(|pair| pair[0] != pair[1]).count();
        let mean_run = numbers.len() as f64 / changes as f64;
        assert!((7.0..12.0).contains(&mean_run), "{mean_run}");
        let counts = counts(&numbers);
        // 1 of 10.3 (the harmonic number of 16,384).
        let share = f64::from(counts[&0]) / numbers.len() as f64;
        assert!((0.06..0.14).contains(&share), "{share}");
    }
}
