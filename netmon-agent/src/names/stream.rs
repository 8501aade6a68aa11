//! The beginning of a stream of bytes, of which pieces come in any order.

/// Most bytes of a stream that are looked at: a hello of 16 KiB in TLS records of any size, or after something else.
pub(super) const MOST_BYTES: usize = 24 << 10;
/// Most pieces with gaps between them. Chrome cuts a QUIC hello into some dozens.
const MOST_PIECES: usize = 512;

/// Bytes by their offsets. Where pieces overlap, the one that came first counts, as with most receivers.
#[derive(Clone, Debug, Default)]
pub(super) struct Stream {
    bytes: Vec<u8>,
    /// Which bytes came: ranges in order, none touching another.
    pieces: Vec<(usize, usize)>,
}

impl Stream {
    /// A piece that belongs at `at`. What lies beyond [`MOST_BYTES`] is left out.
    pub fn insert(&mut self, at: usize, piece: &[u8]) {
        let end = at.saturating_add(piece.len()).min(MOST_BYTES);
        if at >= end || self.pieces.len() >= MOST_PIECES {
            return;
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        // The pieces that this one touches are one with it.
        let first = self.pieces.partition_point(|&(_, old_end)| old_end < at);
        let behind = self.pieces.partition_point(|&(start, _)| start <= end);
        let mut from = at;
        for &(start, old_end) in &self.pieces[first..behind] {
            if from < start {
                self.bytes[from..start].copy_from_slice(&piece[from - at..start - at]);
            }
            from = from.max(old_end);
        }
        if from < end {
            self.bytes[from..end].copy_from_slice(&piece[from - at..end - at]);
        }
        let touched = &self.pieces[first..behind];
        let start = touched.first().map_or(at, |&(start, _)| start.min(at));
        let end = touched.last().map_or(end, |&(_, old_end)| old_end.max(end));
        self.pieces.splice(first..behind, [(start, end)]);
    }

    /// What there is from offset 0 to the first gap.
    pub fn beginning(&self) -> &[u8] {
        match self.pieces.first() {
            Some(&(0, end)) => &self.bytes[..end],
            _ => &[],
        }
    }

    /// Makes room for `by` bytes in front of all: what was at 0 is at `by`.
    pub fn make_room(&mut self, by: usize) {
        let by = by.min(MOST_BYTES);
        let kept = self.bytes.len().min(MOST_BYTES - by);
        self.bytes.truncate(kept);
        self.bytes.splice(0..0, std::iter::repeat_n(0, by));
        self.pieces.retain_mut(|(start, end)| {
            (*start, *end) = (*start + by, (*end).min(kept) + by);
            start < end
        });
    }

    /// Forgets the first `by` bytes: what was at `by` is at 0.
    pub fn cut(&mut self, by: usize) {
        self.bytes.drain(..by.min(self.bytes.len()));
        self.pieces.retain_mut(|(start, end)| {
            (*start, *end) = (start.saturating_sub(by), end.saturating_sub(by));
            start < end
        });
    }

    /// Memory that it holds.
    pub fn held(&self) -> usize {
        self.bytes.capacity() + self.pieces.capacity() * size_of::<(usize, usize)>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shuffled(random: &mut fastrand::Rng, count: usize) -> Vec<usize> {
        let mut order: Vec<_> = (0..count).collect();
        random.shuffle(&mut order);
        order
    }

    #[test]
    fn pieces_in_any_order_with_overlaps_are_the_stream() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..2_000 {
            let length = random.usize(1..200);
            let whole: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
            let mut stream = Stream::default();
            let mut came = vec![false; length];
            for at in shuffled(&mut random, length) {
                let end = (at + random.usize(1..20)).min(length);
                stream.insert(at, &whole[at..end]);
                came[at..end].fill(true);
                let beginning = came.iter().position(|came| !came).unwrap_or(length);
                assert_eq!(stream.beginning(), &whole[..beginning]);
            }
            assert_eq!(stream.pieces, [(0, length)]);
        }
    }

    #[test]
    fn what_came_first_counts() {
        let mut stream = Stream::default();
        stream.insert(2, b"cd");
        stream.insert(0, b"abXXef");
        assert_eq!(stream.beginning(), b"abcdef");
        stream.insert(0, b"ZZZZZZgh");
        assert_eq!(stream.beginning(), b"abcdefgh");
    }

    #[test]
    fn room_can_be_made_and_cut_off_in_front() {
        let mut stream = Stream::default();
        stream.insert(0, b"cd");
        stream.insert(4, b"gh");
        stream.make_room(2);
        assert_eq!(stream.beginning(), b"");
        stream.insert(0, b"ab");
        assert_eq!(stream.beginning(), b"abcd");
        stream.cut(3);
        assert_eq!(stream.beginning(), b"d");
        stream.insert(1, b"ef");
        assert_eq!(stream.beginning(), b"defgh");
        stream.cut(100);
        assert_eq!(stream.beginning(), b"");
    }

    #[test]
    fn nothing_beyond_the_bound_is_kept() {
        let mut stream = Stream::default();
        stream.insert(MOST_BYTES - 1, &[1; 100]);
        stream.insert(usize::MAX, &[1; 100]);
        stream.make_room(usize::MAX);
        stream.insert(0, &[2; 2 * MOST_BYTES]);
        assert_eq!(stream.beginning().len(), MOST_BYTES);
        let mut gaps = Stream::default();
        (0..MOST_BYTES / 2).for_each(|n| gaps.insert(2 * n, &[0]));
        assert_eq!(gaps.pieces.len(), MOST_PIECES);
        assert!(gaps.held() < 2 * MOST_BYTES + 32 * MOST_PIECES);
    }
}
