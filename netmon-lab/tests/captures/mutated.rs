//! Frames with random damage. The seed is fixed, so a difference comes back.

use fastrand::Rng;

use crate::{
    crafted::corpus,
    equal,
    making::{Directory, pcap},
};

/// One to three bytes of the headers changed, and every fourth frame cut.
fn mutate(frame: &[u8], random: &mut Rng) -> Vec<u8> {
    /// Link-layer addresses are in front: what they are changes nothing, and tshark takes some for other protocols.
    const ADDRESSES: usize = 12;
    /// Headers end here in nearly all frames of the corpus.
    const HEADERS: usize = 90;
    let mut frame = frame.to_vec();
    let end = frame.len().min(HEADERS);
    for _ in 0..=random.usize(..3) {
        let at = ADDRESSES + random.usize(..end - ADDRESSES);
        match random.usize(..3) {
            0 => frame[at] ^= 1 << random.usize(..8),
            1 => frame[at] = random.u8(..),
            // Numbers that mean something in one header or another.
            _ => {
                frame[at] =
                    [0, 1, 4, 6, 17, 40, 43, 44, 45, 51, 58, 60, 0x45, 0x60, 0x81, 0xff][random.usize(..16)]
            }
        }
    }
    if random.usize(..4) == 0 {
        let length = 14 + random.usize(..frame.len() - 13);
        frame.truncate(length);
    }
    frame
}

#[test]
fn damaged_frames_are_counted_as_tshark_counts_them() {
    const FRAMES: usize = 30_000;
    let directory = Directory::new();
    let corpus = corpus();
    for seed in [1, 0x6e65_746d_6f6e] {
        let mut random = Rng::with_seed(seed);
        let frames: Vec<_> =
            (0..FRAMES).map(|_| mutate(&corpus[random.usize(..corpus.len())], &mut random)).collect();
        let path = directory.join("damaged.pcap");
        pcap(&path, 1, &frames);
        let replay = equal(&path);
        println!("{replay}");
        let played = FRAMES - replay.not_played.len();
        assert!(played > FRAMES * 95 / 100, "{replay}");
        for compared in &replay.hooks {
            assert_eq!(compared.netmon.frames(), played as u64, "{replay}");
        }
    }
}
