//! Random inputs, and the exact side of a comparison.

/// SplitMix64 (Steele et al. 2014), so that the test has random numbers of its own.
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Numbers(seed)
    }

    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in -1 .. 1.
    pub fn value(&mut self) -> f64 {
        (self.word() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    pub fn values(&mut self, len: usize) -> Vec<f64> {
        (0..len).map(|_| self.value()).collect()
    }

    /// Uniform in `middle - width .. middle + width`.
    pub fn around(&mut self, middle: f64, width: f64, len: usize) -> Vec<f64> {
        (0..len).map(|_| middle + width * self.value()).collect()
    }

    pub fn signs(&mut self, len: usize) -> Vec<f64> {
        (0..len).map(|_| self.value().signum()).collect()
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.word() % bound as u64) as usize
    }

    pub fn ids(&mut self, bound: usize, len: usize) -> Vec<u32> {
        (0..len).map(|_| self.below(bound) as u32).collect()
    }

    /// `len` different numbers below `bound`, in no order.
    pub fn distinct(&mut self, bound: usize, len: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..bound as u32).collect();
        for i in 0..len {
            let other = i + self.below(bound - i);
            all.swap(i, other);
        }
        all.truncate(len);
        all
    }
}

/// What one element of an output should be.
#[derive(Clone, Copy, Debug)]
pub struct Exact {
    pub value: f64,
    /// Sum of the absolute terms that make up the value: what f32 noise is measured by.
    pub magnitude: f64,
    /// Storage steps that rounding may cost.
    pub steps: f64,
    /// What may be lost where a value on the way to this one is rounded to the storage type.
    pub on_the_way: f64,
}

impl Exact {
    /// The element must hold the very bits that it held before.
    pub const UNTOUCHED: Exact = Exact {
        value: f64::NAN,
        magnitude: 0.0,
        steps: 0.0,
        on_the_way: 0.0,
    };

    /// A value moved, not computed.
    pub fn copy(value: f64) -> Self {
        Exact {
            value,
            magnitude: 0.0,
            steps: 0.0,
            on_the_way: 0.0,
        }
    }

    /// A value computed in f32 and rounded once.
    pub fn new(value: f64, magnitude: f64) -> Self {
        Exact {
            value,
            magnitude,
            steps: 0.5,
            on_the_way: 0.0,
        }
    }

    /// The same where another value may be rounded before.
    pub fn losing(self, on_the_way: f64) -> Self {
        Exact { on_the_way, ..self }
    }

    /// The sum of terms.
    pub fn sum(terms: impl IntoIterator<Item = f64>) -> Self {
        let (value, magnitude) = terms.into_iter().fold((0.0, 0.0), |(sum, size), term| {
            (sum + term, size + term.abs())
        });
        Exact::new(value, magnitude)
    }

    pub fn is_untouched(self) -> bool {
        self.value.is_nan()
    }
}

/// `sum of a b`.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn values(exact: &[Exact]) -> Vec<f64> {
    exact.iter().map(|exact| exact.value).collect()
}
