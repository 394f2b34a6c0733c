//! Attention and its gradient as plain loops in f64.

use mp_train::backend::{AttentionLayout, Span};

use crate::layouts::place;
use crate::numbers::Exact;

/// Prefix keys and values, `[P, 2, G, D]` or one of these per sequence.
#[derive(Clone, Copy)]
pub struct PrefixValues<'a> {
    pub key_value: &'a [f64],
    pub len: usize,
    pub per_sequence: bool,
}

/// Operands of an attention.
#[derive(Clone, Copy)]
pub struct Problem<'a> {
    pub query: &'a [f64],
    pub key_value: &'a [f64],
    pub prefix: Option<PrefixValues<'a>>,
    pub layout: &'a AttentionLayout,
    pub spans: &'a [Span],
    pub scale: f64,
}

/// One query of one head.
#[derive(Clone, Copy)]
struct Query {
    sequence: usize,
    /// Row of the micro-batch.
    row: usize,
    head: usize,
    /// Its index among the keys of the sequence.
    t: usize,
}

/// Where a key and its value stand.
#[derive(Clone, Copy)]
enum Key {
    /// Places of the first elements in the prefix.
    Prefix { key: usize, value: usize },
    /// Places of the first elements among keys and values.
    Own { key: usize, value: usize },
}

impl<'a> Problem<'a> {
    fn queries(&self) -> Vec<Query> {
        let mut queries = Vec::new();
        for (sequence, span) in self.spans.iter().enumerate() {
            for i in 0..span.q_len {
                for head in 0..self.layout.heads {
                    queries.push(Query {
                        sequence,
                        row: span.q_start + i,
                        head,
                        t: span.kv_len - span.q_len + i,
                    });
                }
            }
        }
        queries
    }

    /// The keys that a query sees.
    fn keys(&self, query: Query) -> Vec<Key> {
        let layout = self.layout;
        let (dim, kv_heads) = (layout.head_dim, layout.kv_heads);
        let head = query.head * kv_heads / layout.heads;
        let span = self.spans[query.sequence];
        let mut keys = Vec::new();
        if let Some(prefix) = self.prefix {
            let block = if prefix.per_sequence {
                query.sequence
            } else {
                0
            };
            for position in 0..prefix.len {
                let part = |which: usize| {
                    (((block * prefix.len + position) * 2 + which) * kv_heads + head) * dim
                };
                keys.push(Key::Prefix {
                    key: part(0),
                    value: part(1),
                });
            }
        }
        for k in 0..span.kv_len {
            if k <= query.t || k < span.context_length {
                let row = span.kv_start + k;
                keys.push(Key::Own {
                    key: place(layout.key, row, head, 0),
                    value: place(layout.value, row, head, 0),
                });
            }
        }
        keys
    }

    fn query_values(&self, query: Query) -> &'a [f64] {
        let start = place(self.layout.query, query.row, query.head, 0);
        &self.query[start..start + self.layout.head_dim]
    }

    /// Key and value at their places.
    fn key_and_value(&self, key: Key) -> (&'a [f64], &'a [f64]) {
        let dim = self.layout.head_dim;
        let (values, key, value) = match (key, self.prefix) {
            (Key::Prefix { key, value }, Some(prefix)) => (prefix.key_value, key, value),
            (Key::Own { key, value }, _) | (Key::Prefix { key, value }, None) => {
                (self.key_value, key, value)
            }
        };
        (&values[key..key + dim], &values[value..value + dim])
    }

    fn score(&self, q: &[f64], key: &[f64]) -> Exact {
        Exact::sum(q.iter().zip(key).map(|(q, k)| self.scale * q * k))
    }

    /// Output `[T, N, D]` and log-sum-exp `[T, N]`; rows of no span are untouched.
    pub fn forward(&self, rows: usize) -> (Vec<Exact>, Vec<Exact>) {
        let (dim, heads) = (self.layout.head_dim, self.layout.heads);
        let mut out = vec![Exact::UNTOUCHED; rows * heads * dim];
        let mut lse = vec![Exact::UNTOUCHED; rows * heads];
        for query in self.queries() {
            let q = self.query_values(query);
            let keys = self.keys(query);
            let scores: Vec<Exact> = keys
                .iter()
                .map(|&key| self.score(q, self.key_and_value(key).0))
                .collect();
            let max = scores
                .iter()
                .fold(f64::NEG_INFINITY, |max, s| max.max(s.value));
            let sum: f64 = scores.iter().map(|s| (s.value - max).exp()).sum();
            let noise = scores
                .iter()
                .fold(1.0f64, |noise, s| noise.max(s.magnitude));
            let at = query.row * heads + query.head;
            lse[at] = Exact::new(max + sum.ln(), max.abs() + sum.ln() + noise);
            for d in 0..dim {
                let (mut value, mut size) = (0.0, 0.0);
                for (score, &key) in scores.iter().zip(&keys) {
                    let term = (score.value - max).exp() / sum * self.key_and_value(key).1[d];
                    value += term;
                    size += term.abs() * (1.0 + noise);
                }
                out[at * dim + d] = Exact::new(value, size);
            }
        }
        (out, lse)
    }
}

/// What the backward pass is given besides the operands.
pub struct Saved<'a> {
    pub dout: &'a [f64],
    pub out: &'a [f64],
    pub lse: &'a [f64],
}

/// A gradient buffer in which only places of the op get a value.
struct Sums {
    exact: Vec<Exact>,
}

impl Sums {
    fn new(len: usize) -> Self {
        Sums {
            exact: vec![Exact::UNTOUCHED; len],
        }
    }

    fn touch(&mut self, start: usize, len: usize) {
        for exact in &mut self.exact[start..start + len] {
            if exact.is_untouched() {
                *exact = Exact::new(0.0, 0.0);
            }
        }
    }

    fn add(&mut self, start: usize, factor: Exact, vector: &[f64]) {
        self.touch(start, vector.len());
        for (exact, x) in self.exact[start..].iter_mut().zip(vector) {
            exact.value += factor.value * x;
            exact.magnitude += factor.magnitude * x.abs();
        }
    }
}

/// What a backend may make of a probability, or of the gradient of a score, on its way into a product:
/// rounded to f16, a value below f16's smallest normal number is off as if it were that large. To f32
/// this means nothing.
fn into_product(x: Exact) -> Exact {
    Exact::new(x.value, x.magnitude + 1.0 / 16384.0)
}

impl Problem<'_> {
    /// Gradients of query, key and value heads in `dqkv`, and of the prefix of each sequence,
    /// `[S, P, 2, G, D]`.
    pub fn backward(&self, saved: &Saved) -> (Vec<Exact>, Vec<Exact>) {
        let layout = self.layout;
        let (dim, heads) = (layout.head_dim, layout.heads);
        let prefix_width = self.prefix.map_or(0, |p| p.len * 2 * layout.kv_heads * dim);
        let mut dqkv = Sums::new(self.query.len());
        let mut dprefix = Sums::new(self.spans.len() * prefix_width);
        for query in self.queries() {
            let at = query.row * heads + query.head;
            let q = self.query_values(query);
            let dout = &saved.dout[at * dim..(at + 1) * dim];
            let out = &saved.out[at * dim..(at + 1) * dim];
            let delta = Exact::sum(dout.iter().zip(out).map(|(a, b)| a * b));
            let query_place = place(layout.query, query.row, query.head, 0);
            for key in self.keys(query) {
                let (k, v) = self.key_and_value(key);
                let score = self.score(q, k);
                let p = (score.value - saved.lse[at]).exp();
                let p = Exact::new(p, p * (1.0 + score.magnitude + saved.lse[at].abs()));
                let dp = Exact::sum(dout.iter().zip(v).map(|(a, b)| a * b));
                let ds = into_product(Exact::new(
                    p.value * (dp.value - delta.value),
                    p.magnitude * (dp.magnitude + delta.magnitude),
                ));
                let ds = Exact::new(self.scale * ds.value, self.scale.abs() * ds.magnitude);
                dqkv.add(query_place, ds, k);
                // Each sequence has a gradient of the prefix, shared or not.
                let (sums, key_place, value_place) = match key {
                    Key::Own { key, value } => (&mut dqkv, key, value),
                    Key::Prefix { key, value } => {
                        let shared = self.prefix.is_some_and(|prefix| !prefix.per_sequence);
                        let shift = if shared {
                            query.sequence * prefix_width
                        } else {
                            0
                        };
                        (&mut dprefix, key + shift, value + shift)
                    }
                };
                sums.add(key_place, ds, q);
                sums.add(value_place, into_product(p), dout);
            }
        }
        (dqkv.exact, dprefix.exact)
    }
}
