//! Attention over sequences, caches and prefixes.

use mp_train::backend::{AttentionLayout, Backend, BackendError, Dropout, Prefix, Span};

use crate::attention_exact::{PrefixValues, Problem, Saved};
use crate::buffer::{Act, Buf, Input};
use crate::check::Check;
use crate::dropout::{keep_p, mask_of, prefix_key};
use crate::layouts::{describe, side_by_side};
use crate::numbers::{Exact, Numbers, dot, values};

/// Length of a prefix, and whether each sequence has its own.
type PrefixKind = Option<(usize, bool)>;

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(6);
    let prefixes: [PrefixKind; 7] = [
        None,
        Some((0, false)),
        Some((1, true)),
        Some((3, false)),
        Some((3, true)),
        Some((65, false)),
        Some((65, true)),
    ];

    // Whole sequences, as in training: head sizes, prefixes, contexts from none to everything.
    for (index, prefix) in prefixes.into_iter().enumerate() {
        let dim = [16, 48, 80, 128][index % 4];
        let lens = [(1, 0), (3, 2), (65, 30), (17, 17), (3, 0)];
        for layout in [
            AttentionLayout::grouped_per_head(2, dim),
            side_by_side(6, 2, dim),
            AttentionLayout::concatenated(4, 2, dim),
        ] {
            let scale = 1.0 / (dim as f32).sqrt();
            whole(b, check, &mut numbers, &layout, &flat(&lens), prefix, scale);
        }
    }
    for (index, len) in [1, 3, 65, 97, 129].into_iter().enumerate() {
        let layout = side_by_side(3, 1, 16);
        for context in [0, len / 2, len] {
            let prefix = prefixes[(index + context) % prefixes.len()];
            whole(
                b,
                check,
                &mut numbers,
                &layout,
                &flat(&[(len, context)]),
                prefix,
                0.25,
            );
        }
    }
    tiles(b, check, &mut numbers);
    odd_heads(b, check, &mut numbers);

    // Scores far apart: the largest has to be subtracted before the exponential.
    let steep = AttentionLayout::grouped_per_head(2, 16);
    whole(
        b,
        check,
        &mut numbers,
        &steep,
        &flat(&[(65, 9), (3, 3)]),
        Some((3, true)),
        40.0,
    );

    // Decoding from a cache: all at once, one query, some queries, in cache rows of any order.
    let tables = [
        [(1, 200, 66, 0), (1, 0, 1, 1), (1, 70, 97, 40), (1, 3, 3, 3)],
        [
            (3, 150, 97, 50),
            (65, 0, 130, 0),
            (1, 260, 2, 1),
            (65, 300, 65, 65),
        ],
    ];
    for (index, table) in tables.into_iter().enumerate() {
        for (step, dim) in [16, 48, 64, 80, 128].into_iter().enumerate() {
            let base = [
                AttentionLayout::grouped_per_head(2, dim),
                side_by_side(6, 2, dim),
                AttentionLayout::concatenated(4, 1, dim),
            ];
            for base in base {
                let prefix = prefixes[(2 * index + step) % prefixes.len()];
                let layout = base.with_cache();
                cached(b, check, &mut numbers, &layout, &decoding(table), prefix);
            }
        }
    }

    gradients(b, check, &mut numbers);
}

/// Sequences, contexts and prefixes that end on, before and behind the border of a tile of 64, or of
/// several; many sequences.
fn tiles<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers) {
    let borders = [
        (64, 63),
        (128, 64),
        (130, 65),
        (63, 0),
        (129, 128),
        (192, 1),
    ];
    for (index, sequence) in borders.into_iter().enumerate() {
        let prefix = [None, Some((64, true)), Some((128, false))][index % 3];
        let layout = side_by_side(2, 1, 64);
        whole(
            b,
            check,
            numbers,
            &layout,
            &flat(&[sequence]),
            prefix,
            0.125,
        );
    }
    let layout = AttentionLayout::grouped_per_head(1, 128);
    let spans = flat(&[(200, 70), (64, 64), (1, 0)]);
    let prefix = Some((128, true));
    whole(b, check, numbers, &layout, &spans, prefix, 0.09);
    let lens: Vec<_> = (0..35).map(|i| (1 + i % 7, i % 3)).collect();
    let layout = side_by_side(2, 1, 32);
    for prefix in [None, Some((5, true))] {
        whole(b, check, numbers, &layout, &flat(&lens), prefix, 0.2);
    }
}

/// Heads that fill no row of a tensor core, start off its borders, or are wider than its tiles.
fn odd_heads<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers) {
    for (index, dim) in [4, 6, 10, 24, 36, 136].into_iter().enumerate() {
        let prefix = [Some((3, true)), None, Some((33, false))][index % 3];
        let lens = [(35, 20), (1, 0)];
        for layout in [
            AttentionLayout::grouped_per_head(2, dim),
            side_by_side(2, 1, dim),
            AttentionLayout::concatenated(3, 1, dim),
        ] {
            let scale = 1.0 / (dim as f32).sqrt();
            whole(b, check, numbers, &layout, &flat(&lens), prefix, scale);
            let spans = [(2, 70, 9, 4), (3, 0, 66, 40)];
            cached(
                b,
                check,
                numbers,
                &layout.with_cache(),
                &decoding(spans),
                prefix,
            );
        }
    }
    // A head that could be read by 16 bytes, in rows that start off them.
    let mut shifted = side_by_side(2, 1, 16);
    for part in [&mut shifted.query, &mut shifted.key, &mut shifted.value] {
        part.offset += 3;
    }
    let spans = flat(&[(35, 20), (1, 0)]);
    whole(b, check, numbers, &shifted, &spans, Some((3, false)), 0.25);
    // Scores against their usual order.
    let layout = side_by_side(2, 1, 16);
    whole(b, check, numbers, &layout, &spans, Some((3, true)), -0.25);
}

/// Queries one behind the other, from (query length, first key, key length, context length).
fn decoding<const S: usize>(table: [(usize, usize, usize, usize); S]) -> [Span; S] {
    let mut q_start = 0;
    table.map(|(q_len, kv_start, kv_len, context_length)| {
        let span = Span {
            q_start,
            q_len,
            kv_start,
            kv_len,
            context_length,
        };
        q_start += q_len;
        span
    })
}

/// Sequences one behind the other, from (length, context length).
fn flat(lens: &[(usize, usize)]) -> Vec<Span> {
    let mut start = 0;
    lens.iter()
        .map(|&(len, context_length)| {
            let span = Span {
                q_start: start,
                q_len: len,
                kv_start: start,
                kv_len: len,
                context_length,
            };
            start += len;
            span
        })
        .collect()
}

fn prefix_of<'a, B: Backend>(buffer: &'a Act<B>, kind: PrefixKind) -> Option<Prefix<'a, B>> {
    kind.map(|(len, per_sequence)| Prefix {
        key_value: &buffer.device,
        len,
        per_sequence,
    })
}

fn prefix_values(key_value: &[f64], kind: PrefixKind) -> Option<PrefixValues<'_>> {
    kind.map(|(len, per_sequence)| PrefixValues {
        key_value,
        len,
        per_sequence,
    })
}

fn prefix_len(kind: PrefixKind, layout: &AttentionLayout, sequences: usize) -> usize {
    kind.map_or(0, |(len, per_sequence)| {
        let copies = if per_sequence { sequences } else { 1 };
        copies * len * layout.key_value_width()
    })
}

/// Buffers that a forward pass fills.
struct Outputs<B: Backend> {
    out: Act<B>,
    lse: Buf<B, f32>,
}

impl<B: Backend> Outputs<B> {
    fn blank(b: &B, layout: &AttentionLayout, rows: usize) -> Self {
        Outputs {
            out: Act::<B>::blank(b, rows * layout.heads * layout.head_dim),
            lse: Buf::<B, f32>::blank(b, rows * layout.heads),
        }
    }
}

/// Queries, keys and values of a micro-batch in one buffer: forward and backward.
fn whole<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    layout: &AttentionLayout,
    spans: &[Span],
    kind: PrefixKind,
    scale: f32,
) {
    let rows: usize = spans.iter().map(|span| span.q_len).sum();
    let width = layout.heads * layout.head_dim;
    let qkv = Act::<B>::of(b, &numbers.values(rows * layout.query.row));
    let prefix = Act::<B>::of(b, &numbers.values(prefix_len(kind, layout, spans.len())));
    let label = label(layout, spans, kind, scale);
    let (qkv_values, prefix_host) = (qkv.values(), prefix.values());
    let problem = Problem {
        query: &qkv_values,
        key_value: &qkv_values,
        prefix: prefix_values(&prefix_host, kind),
        layout,
        spans,
        scale: f64::from(scale),
    };

    let mut got = Outputs::blank(b, layout, rows);
    check.run(b, "attention", label.clone(), &[&qkv, &prefix], || {
        forward(
            b,
            &mut got,
            [&qkv, &qkv],
            prefix_of(&prefix, kind),
            layout,
            spans,
            scale,
        )
    });
    let (exact_out, exact_lse) = problem.forward(rows);
    check.expect(b, &got.out, || exact_out.clone());
    check.part("lse");
    check.expect(b, &got.lse, || exact_lse.clone());

    // The backward pass gets the best out and lse that the storage types can hold.
    let dout = Act::<B>::of(b, &numbers.values(rows * width));
    let out = Act::<B>::of(b, &values(&exact_out));
    let lse = Buf::<B, f32>::of(b, &values(&exact_lse));
    let mut dqkv = Act::<B>::blank(b, rows * layout.query.row);
    let per_sequence = kind.map(|(len, _)| (len, true));
    let dprefix_len = prefix_len(per_sequence, layout, spans.len());
    let mut dprefix = Buf::<B, f32>::blank(b, dprefix_len);
    let inputs: [&dyn Input<B>; 5] = [&dout, &out, &lse, &qkv, &prefix];
    check.run(b, "attention_backward", label, &inputs, || {
        b.attention_backward(
            &mut dqkv.device,
            kind.map(|_| &mut dprefix.device),
            &dout.device,
            &out.device,
            &lse.device,
            &qkv.device,
            prefix_of(&prefix, kind),
            layout,
            spans,
            scale,
        )
    });
    let (dout, out, lse) = (dout.values(), out.values(), lse.values());
    let saved = Saved {
        dout: &dout,
        out: &out,
        lse: &lse,
    };
    let mut exact_dprefix = Vec::new();
    check.expect(b, &dqkv, || {
        let (exact_dqkv, prefixes) = problem.backward(&saved);
        exact_dprefix = prefixes;
        exact_dqkv
    });
    check.expect(b, &dprefix, || exact_dprefix);
}

/// Queries of a micro-batch over keys and values from a cache: forward only.
fn cached<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    layout: &AttentionLayout,
    spans: &[Span],
    kind: PrefixKind,
) {
    let rows: usize = spans.iter().map(|span| span.q_len).sum();
    let cache_rows = spans.iter().map(|span| span.kv_start + span.kv_len).max();
    let query = Act::<B>::of(b, &numbers.values(rows * layout.query.row));
    let cache_len = cache_rows.unwrap() * layout.key_value_width();
    let cache = Act::<B>::of(b, &numbers.values(cache_len));
    let prefix = Act::<B>::of(b, &numbers.values(prefix_len(kind, layout, spans.len())));
    let scale = 1.0 / (layout.head_dim as f32).sqrt();
    let label = format!("from a cache, {}", label(layout, spans, kind, scale));

    let mut got = Outputs::blank(b, layout, rows);
    check.run(b, "attention", label, &[&query, &cache, &prefix], || {
        forward(
            b,
            &mut got,
            [&query, &cache],
            prefix_of(&prefix, kind),
            layout,
            spans,
            scale,
        )
    });
    let (query, cache, prefix) = (query.values(), cache.values(), prefix.values());
    let problem = Problem {
        query: &query,
        key_value: &cache,
        prefix: prefix_values(&prefix, kind),
        layout,
        spans,
        scale: f64::from(scale),
    };
    let mut exact_lse = Vec::new();
    check.expect(b, &got.out, || {
        let (exact_out, lse) = problem.forward(rows);
        exact_lse = lse;
        exact_out
    });
    check.part("lse");
    check.expect(b, &got.lse, || exact_lse);
}

fn forward<B: Backend>(
    b: &B,
    got: &mut Outputs<B>,
    [query, key_value]: [&Act<B>; 2],
    prefix: Option<Prefix<'_, B>>,
    layout: &AttentionLayout,
    spans: &[Span],
    scale: f32,
) -> Result<(), BackendError> {
    b.attention(
        &mut got.out.device,
        &mut got.lse.device,
        &query.device,
        &key_value.device,
        prefix,
        layout,
        spans,
        scale,
    )
}

fn label(layout: &AttentionLayout, spans: &[Span], kind: PrefixKind, scale: f32) -> String {
    let spans: Vec<String> = spans
        .iter()
        .map(|span| format!("{}/{}/{}", span.q_len, span.kv_len, span.context_length))
        .collect();
    let layout = describe(layout);
    format!(
        "{layout}, prefix {kind:?}, scale {scale}, query/key/context lengths {}",
        spans.join(" ")
    )
}

/// Differences through attention, with a prefix shared, or dropped out per sequence first.
fn gradients<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers) {
    let spans = [
        flat(&[(1, 0), (3, 2), (9, 4)]),
        flat(&[(5, 5), (65, 20)]),
        flat(&[(3, 0), (2, 1)]),
    ];
    for (index, spans) in spans.iter().enumerate() {
        for layout in [
            AttentionLayout::grouped_per_head(2, 16),
            side_by_side(6, 2, 16),
            AttentionLayout::concatenated(4, 2, 6),
        ] {
            for dropped in [false, true] {
                let prefix_len = [3, 1, 65][index];
                through_prefix(b, check, numbers, &layout, spans, prefix_len, dropped);
            }
        }
    }
}

fn through_prefix<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    layout: &AttentionLayout,
    spans: &[Span],
    len: usize,
    dropped: bool,
) {
    let sequences = spans.len();
    let rows: usize = spans.iter().map(|span| span.q_len).sum();
    let cols = layout.key_value_width();
    let scale = 0.4f32;
    let kind = Some((len, dropped));
    let dropout = dropped.then(|| Dropout {
        p: keep_p(),
        key: prefix_key(),
    });
    let label = format!("dropout {dropped}, {}", label(layout, spans, kind, scale));

    // The whole way on the backend: gradients of qkv, and of the prefix that all sequences share.
    let qkv = Act::<B>::of(b, &numbers.values(rows * layout.query.row));
    let shared = Act::<B>::of(b, &numbers.values(len * cols));
    let spread = |b: &B, shared: Act<B>| match dropout {
        None => shared,
        Some(dropout) => {
            let mut own = Act::<B>::blank(b, sequences * len * cols);
            b.prefix_dropout(
                &mut own.device,
                &shared.device,
                dropout,
                sequences,
                len,
                cols,
            )
            .unwrap();
            own
        }
    };
    let (qkv_values, shared_values) = (qkv.values(), shared.values());
    let prefix = spread(b, shared);
    let mut got = Outputs::blank(b, layout, rows);
    let given = prefix_of(&prefix, kind);
    forward(b, &mut got, [&qkv, &qkv], given, layout, spans, scale).unwrap();
    let dout = Act::<B>::of(b, &numbers.values(rows * layout.heads * layout.head_dim));
    let c = dout.values();
    let mut dqkv = Act::<B>::target(b, &vec![0.0; rows * layout.query.row]);
    let mut dprefix = Buf::<B, f32>::blank(b, sequences * len * cols);
    b.attention_backward(
        &mut dqkv.device,
        Some(&mut dprefix.device),
        &dout.device,
        &got.out.device,
        &got.lse.device,
        &qkv.device,
        given,
        layout,
        spans,
        scale,
    )
    .unwrap();
    let mut dshared = Buf::<B, f32>::target(b, &vec![0.0; len * cols]);
    b.prefix_gradient(
        &mut dshared.device,
        &dprefix.device,
        dropout,
        sequences,
        len,
        cols,
    )
    .unwrap();
    let (dqkv, dshared) = (dqkv.result(b), dshared.result(b));

    let functional = |qkv: &[f64], shared: &[f64]| {
        let prefix = match dropout {
            None => shared.to_vec(),
            Some(_) => (0..sequences * len * cols)
                .map(|at| {
                    let (sequence, rest) = (at / (len * cols), at % (len * cols));
                    shared[rest] * mask_of(sequence, rest / cols, rest % cols)
                })
                .collect(),
        };
        let problem = Problem {
            query: qkv,
            key_value: qkv,
            prefix: prefix_values(&prefix, kind),
            layout,
            spans,
            scale: f64::from(scale),
        };
        let (out, _): (Vec<Exact>, _) = problem.forward(rows);
        dot(&c, &values(&out))
    };
    let own = |b: &B, qkv: &[f64], shared: &[f64]| {
        let qkv = Act::<B>::of(b, qkv);
        let prefix = spread(b, Act::<B>::of(b, shared));
        let mut got = Outputs::blank(b, layout, rows);
        let given = prefix_of(&prefix, kind);
        forward(b, &mut got, [&qkv, &qkv], given, layout, spans, scale).unwrap();
        dot(&c, &got.out.result(b))
    };
    check.gradient(
        b,
        "attention_backward",
        label.clone(),
        &[&qkv_values],
        &[&dqkv],
        |p| functional(&p[0], &shared_values),
        |b, p| own(b, &p[0], &shared_values),
    );
    check.gradient(
        b,
        "prefix_gradient",
        label,
        &[&shared_values],
        &[&dshared],
        |p| functional(&qkv_values, &p[0]),
        |b, p| own(b, &qkv_values, &p[0]),
    );
}
