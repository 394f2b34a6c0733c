//! Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
//! easy as 1, 2, 3").
//!
//! A number is a function of what it is for (seed, purpose, step, micro-batch, layer, ..) and of
//! nothing else: not of the number of stages, not of what was drawn before. So a resumed run and a
//! recomputed activation see the same numbers without any generator state being saved.

/// What random numbers are for. Each purpose has its own numbers under the same seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Domain {
    /// Order of the rows in an epoch.
    Shuffle,
    /// Initial values of lora_A.
    LoraInit,
    /// Initial values of the prefix encoder.
    PrefixInit,
    /// Dropout on the input of lora_A.
    LoraDropout,
    /// Dropout on prefix keys and values.
    PrefixDropout,
    /// Choice of the next token.
    Sampling,
    /// Initial values of a whole model.
    ModelInit,
}

impl Domain {
    /// Written out, because runs already saved depend on these numbers.
    fn number(self) -> u32 {
        match self {
            Domain::Shuffle => 1,
            Domain::LoraInit => 2,
            Domain::PrefixInit => 3,
            Domain::LoraDropout => 4,
            Domain::PrefixDropout => 5,
            Domain::Sampling => 6,
            Domain::ModelInit => 7,
        }
    }
}

/// Last counter word of a draw, and of a derived key: the two never meet.
const DRAW: u32 = 0;
const DERIVE: u32 = 1;

/// A place in the space of random numbers, reached from the seed coordinate by coordinate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key([u32; 2]);

impl Key {
    /// The key of one purpose under a seed.
    pub fn new(seed: u64, domain: Domain) -> Self {
        Key(split(seed)).derive([domain.number(), 0, 1])
    }

    /// The key one coordinate further: a step, micro-batch, sequence, layer or site. Order matters.
    pub fn fold(self, coordinate: u64) -> Self {
        let [low, high] = split(coordinate);
        self.derive([low, high, 0])
    }

    /// Four random words for one place of a two-dimensional array, e.g. a token and a group of four
    /// channels.
    pub fn words(self, row: u32, column: u64) -> [u32; 4] {
        let [low, high] = split(column);
        philox([low, high, row, DRAW], self.0)
    }

    /// The words of row 0 from `4 * block` on, as [`Key::stream`] has them one by one, handed to `work` with
    /// their places in `out`, of which the last may take fewer than there are.
    #[inline(always)]
    pub fn fill<T>(self, block: u64, out: &mut [T], work: impl Fn(u32) -> T) {
        const LANES: usize = 16;
        for (index, out) in out.chunks_mut(4 * LANES).enumerate() {
            let first = block + (index * LANES) as u64;
            let counter = |lane: usize| split(first + lane as u64);
            let counters = [
                std::array::from_fn(|lane| counter(lane)[0]),
                std::array::from_fn(|lane| counter(lane)[1]),
                [0; LANES],
                [DRAW; LANES],
            ];
            let words = philox_lanes::<LANES>(counters, self.0);
            for (lane, out) in out.chunks_mut(4).enumerate() {
                for (out, words) in out.iter_mut().zip(&words) {
                    *out = work(words[lane]);
                }
            }
        }
    }

    /// All words of row 0 in order.
    pub fn stream(self) -> Stream {
        self.stream_from(0)
    }

    /// The same but for the first `skipped`.
    pub fn stream_from(self, skipped: u64) -> Stream {
        Stream {
            key: self,
            drawn: skipped,
            words: self.words(0, skipped / 4),
        }
    }

    /// The key itself, for generators that run elsewhere.
    pub fn to_words(self) -> [u32; 2] {
        self.0
    }

    fn derive(self, [a, b, c]: [u32; 3]) -> Self {
        let [x, y, _, _] = philox([a, b, c, DERIVE], self.0);
        Key([x, y])
    }
}

/// Random words one after another.
#[derive(Clone, Debug)]
pub struct Stream {
    key: Key,
    drawn: u64,
    words: [u32; 4],
}

impl Stream {
    /// The next word.
    pub fn next_word(&mut self) -> u32 {
        let place = (self.drawn % 4) as usize;
        if place == 0 {
            self.words = self.key.words(0, self.drawn / 4);
        }
        self.drawn += 1;
        self.words[place]
    }

    /// A uniform number in `[0, 1)` with 24 random bits.
    pub fn uniform(&mut self) -> f32 {
        uniform(self.next_word())
    }

    /// A standard normal number.
    pub fn normal(&mut self) -> f32 {
        let (first, second) = (self.next_word(), self.next_word());
        normal(first, second)
    }

    /// A uniform integer in `0..bound` without modulo bias (Lemire 2019); 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The lowest `2^64 mod bound` products of each bucket are one too many for a fair share.
        let surplus = bound.wrapping_neg().checked_rem(bound).unwrap_or(0);
        loop {
            let word = u64::from(self.next_word()) << 32 | u64::from(self.next_word());
            let product = u128::from(word) * u128::from(bound);
            if product as u64 >= surplus {
                return (product >> 64) as u64;
            }
        }
    }
}

/// The order in which an epoch sees `n` rows: a permutation of `0..n` (Fisher-Yates) that depends
/// on seed and epoch alone.
pub fn shuffle(seed: u64, epoch: u64, n: usize) -> Vec<usize> {
    let mut stream = Key::new(seed, Domain::Shuffle).fold(epoch).stream();
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        order.swap(last, stream.below(last as u64 + 1) as usize);
    }
    order
}

/// A uniform number in `[0, 1)` from the upper 24 bits of a word; all of them are exact in f32.
pub fn uniform(word: u32) -> f32 {
    (word >> 8) as f32 / 16_777_216.0
}

/// A standard normal number from two words (Box-Muller; at most 6.7 from 0).
pub fn normal(first: u32, second: u32) -> f32 {
    let above_zero = (f64::from(first) + 1.0) / 4_294_967_296.0;
    let angle = std::f64::consts::TAU * f64::from(second) / 4_294_967_296.0;
    ((-2.0 * above_zero.ln()).sqrt() * angle.cos()) as f32
}

/// Philox4x32-10: four random words, a bijection of the counter for every key.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    philox_lanes(counter.map(|word| [word]), key).map(|[word]| word)
}

/// The same for N counters at a time, lane by lane, which become vector code.
#[inline(always)]
fn philox_lanes<const N: usize>(counters: [[u32; N]; 4], key: [u32; 2]) -> [[u32; N]; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counters;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        for lane in 0..N {
            let [low0, high0] = split(u64::from(c0[lane]) * 0xD251_1F53);
            let [low1, high1] = split(u64::from(c2[lane]) * 0xCD9E_8D57);
            c0[lane] = high1 ^ c1[lane] ^ k0;
            c1[lane] = low1;
            c2[lane] = high0 ^ c3[lane] ^ k1;
            c3[lane] = low0;
        }
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// The largest number of [`near_normal`].
pub const NEAR_NORMAL_LARGEST: i32 = 4 * 255 / 2;

/// Its standard deviation: the square root of 4 (256² - 1) / 12.
pub const NEAR_NORMAL_DEVIATION: f32 = 147.800_54;

/// A whole number that is normally distributed for most purposes: the four bytes of a word added up, less
/// their mean (Irwin 1927, Hall 1927). Its kurtosis is 2.7, and it ends 3.45 deviations from 0.
///
/// Unlike [`normal`] it needs no function whose last bits differ between processors.
#[inline(always)]
pub fn near_normal(word: u32) -> i32 {
    // Two pairs of bytes in one word, then both sums.
    let pairs = (word & 0x00ff_00ff) + (word >> 8 & 0x00ff_00ff);
    ((pairs & 0xffff) + (pairs >> 16)) as i32 - NEAR_NORMAL_LARGEST
}

/// Low and high half.
#[inline(always)]
fn split(word: u64) -> [u32; 2] {
    [word as u32, (word >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kat_vectors` of the Random123 distribution, lines `philox4x32 10`.
    #[test]
    fn philox_gives_the_published_answers() {
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox(counter, key), expected);
        }
    }

    #[test]
    fn keys_of_different_purposes_and_coordinates_differ() {
        let domains = [
            Domain::Shuffle,
            Domain::LoraInit,
            Domain::PrefixInit,
            Domain::LoraDropout,
            Domain::PrefixDropout,
            Domain::Sampling,
            Domain::ModelInit,
        ];
        let mut seen = std::collections::HashSet::new();
        for seed in [0, 1, 1 << 32] {
            for domain in domains {
                let key = Key::new(seed, domain);
                assert!(seen.insert(key.0));
                for coordinate in [0, 1, 2, 1 << 32] {
                    assert!(seen.insert(key.fold(coordinate).0));
                    assert!(seen.insert(key.fold(coordinate).fold(coordinate).0));
                }
            }
        }
        assert_ne!(
            Key::new(7, Domain::LoraDropout).fold(1).fold(2),
            Key::new(7, Domain::LoraDropout).fold(2).fold(1)
        );
    }

    #[test]
    fn uniform_spans_zero_to_one_without_one() {
        assert_eq!(uniform(0), 0.0);
        assert_eq!(uniform(u32::MAX), 1.0 - 1.0 / 16_777_216.0);
        let mut stream = Key::new(3, Domain::LoraInit).stream();
        let mean = (0..10_000)
            .map(|_| f64::from(stream.uniform()))
            .sum::<f64>()
            / 10_000.0;
        assert!((mean - 0.5).abs() < 0.015, "{mean}");
    }

    #[test]
    fn normal_has_the_right_moments_and_no_infinity() {
        assert!(normal(0, 0).is_finite() && normal(u32::MAX, u32::MAX).is_finite());
        let mut stream = Key::new(3, Domain::PrefixInit).stream();
        let numbers: Vec<f64> = (0..20_000).map(|_| f64::from(stream.normal())).collect();
        let moment =
            |power: i32| numbers.iter().map(|x| x.powi(power)).sum::<f64>() / numbers.len() as f64;
        assert!(moment(1).abs() < 0.03, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.04, "{}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.4, "{}", moment(4));
    }

    #[test]
    fn near_normal_has_the_moments_that_are_said() {
        // How often each sum of four bytes comes, counted byte by byte.
        let mut counts = vec![1_u64];
        for _ in 0..4 {
            let mut next = vec![0; counts.len() + 255];
            for (sum, count) in counts.iter().enumerate() {
                next[sum..=sum + 255].iter_mut().for_each(|n| *n += count);
            }
            counts = next;
        }
        let moment = |power: i32| {
            let term = |(sum, &count): (usize, &u64)| {
                let value = sum as f64 - f64::from(NEAR_NORMAL_LARGEST);
                value.powi(power) * count as f64
            };
            counts.iter().enumerate().map(term).sum::<f64>() / 2.0_f64.powi(32)
        };
        assert_eq!(moment(1), 0.0);
        assert_eq!(moment(2).sqrt() as f32, NEAR_NORMAL_DEVIATION);
        assert!((moment(4) / moment(2).powi(2) - 2.7).abs() < 0.001);
        let ends = [(0, -NEAR_NORMAL_LARGEST), (u32::MAX, NEAR_NORMAL_LARGEST)];
        for (word, expected) in ends {
            assert_eq!(near_normal(word), expected);
        }
        for word in [0x0102_0304, 0xff00_01fe, 0x8000_7f09] {
            let sum: i32 = u32::to_le_bytes(word).map(i32::from).iter().sum();
            assert_eq!(near_normal(word), sum - NEAR_NORMAL_LARGEST);
        }
    }

    #[test]
    fn words_filled_in_are_those_of_the_stream() {
        let key = Key::new(9, Domain::ModelInit).fold(3);
        // Across the border of a counter's halves too.
        for block in [0, 5, (1 << 32) - 3] {
            for len in [0, 1, 3, 64, 65, 97, 200] {
                let mut filled = vec![0; len];
                key.fill(block, &mut filled, |word| word);
                let mut stream = key.stream_from(4 * block);
                let expected: Vec<u32> = (0..len).map(|_| stream.next_word()).collect();
                assert_eq!(filled, expected);
            }
        }
    }

    #[test]
    fn bounded_integers_are_fair_and_in_bounds() {
        let mut stream = Key::new(11, Domain::Sampling).stream();
        let mut counts = [0_u32; 6];
        for _ in 0..60_000 {
            counts[stream.below(6) as usize] += 1;
        }
        assert!(
            counts.iter().all(|&c| c.abs_diff(10_000) < 500),
            "{counts:?}"
        );
        // Four words share three numbers here: one in four is rejected, or else multiples of three
        // would come up half of the time.
        let bound = 3 << 62;
        let threes = (0..9_000)
            .filter(|_| stream.below(bound).is_multiple_of(3))
            .count();
        assert!(threes.abs_diff(3_000) < 250, "{threes}");
        assert_eq!((stream.below(1), stream.below(0)), (0, 0));
    }

    #[test]
    fn shuffle_is_a_permutation_that_depends_on_seed_and_epoch() {
        let order = shuffle(5, 0, 97);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..97).collect::<Vec<_>>());
        assert_eq!(order, shuffle(5, 0, 97));
        assert_ne!(order, shuffle(5, 1, 97));
        assert_ne!(order, shuffle(6, 0, 97));
        assert_eq!(shuffle(5, 0, 0), Vec::<usize>::new());
        assert_eq!(shuffle(5, 0, 1), [0]);
        let firsts: std::collections::HashSet<Vec<usize>> =
            (0..200).map(|epoch| shuffle(5, epoch, 3)).collect();
        assert_eq!(firsts.len(), 6, "every order of three rows comes up");
    }
}
