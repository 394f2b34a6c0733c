//! Dropout of activations and prefixes.

use mp_train::backend::{Backend, Dropout, Span};
use mp_train::random::{Domain, Key};

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::numbers::{Exact, Numbers, dot};

const SEED: u64 = 0x0123_4567_89ab_cdef;

/// `Domain::PrefixDropout` as it enters the counter.
const PREFIX_DROPOUT: u32 = 5;

/// The probability in the cases that share [`mask_of`].
pub fn keep_p() -> f32 {
    0.3
}

pub fn prefix_key() -> Key {
    Key::new(SEED, Domain::PrefixDropout)
}

/// The mask that [`prefix_key`] and [`keep_p`] have to give: 0 or `1 / (1 - p)`.
pub fn mask_of(sequence: usize, row: usize, col: usize) -> f64 {
    mask(keep_p(), sequence, row, col)
}

fn mask(p: f32, sequence: usize, row: usize, col: usize) -> f64 {
    let p = f64::from(p);
    let word = words(sequence, row, col / 4)[col % 4];
    let uniform = f64::from(word >> 8) / 16_777_216.0;
    if uniform < p { 0.0 } else { 1.0 / (1.0 - p) }
}

/// Four random words: seed, purpose, sequence, row, group of four columns.
fn words(sequence: usize, row: usize, quad: usize) -> [u32; 4] {
    const DERIVE: u32 = 1;
    let seed = [SEED as u32, (SEED >> 32) as u32];
    let purpose = philox([PREFIX_DROPOUT, 0, 1, DERIVE], seed);
    let key = philox([sequence as u32, 0, 0, DERIVE], [purpose[0], purpose[1]]);
    philox([quad as u32, 0, row as u32, 0], [key[0], key[1]])
}

/// Philox4x32-10 (Salmon et al. 2011), written as in the paper: ten rounds of two products.
fn philox(mut x: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(x[0]) * 0xD251_1F53;
        let b = u64::from(x[2]) * 0xCD9E_8D57;
        let high = |product: u64| (product / (1 << 32)) as u32;
        let low = |product: u64| (product % (1 << 32)) as u32;
        x = [
            high(b) ^ x[1] ^ key[0],
            low(b),
            high(a) ^ x[3] ^ key[1],
            low(a),
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    x
}

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    assert_eq!(
        philox(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0]
        ),
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        "the published answer"
    );
    let mut numbers = Numbers::new(7);
    let batches: [&[usize]; 5] = [&[1], &[3], &[1, 65, 3], &[97, 1], &[65, 97]];
    for lens in batches {
        for cols in [1, 3, 65, 97] {
            for p in [0.0, keep_p(), 0.9] {
                activations(b, check, &mut numbers, lens, cols, p);
            }
        }
    }
    activations(b, check, &mut numbers, &[65, 97], 509, keep_p());
    // Rows that can be loaded 16 bytes at a time.
    for (lens, cols) in [(&[3, 2][..], 8), (&[1, 3], 64), (&[2, 1], 2056)] {
        activations(b, check, &mut numbers, lens, cols, keep_p());
    }
    for sequences in [1, 3] {
        for len in [1, 3, 65] {
            for cols in [1, 3, 65, 97] {
                prefixes(b, check, &mut numbers, [sequences, len, cols]);
            }
        }
    }
    prefixes(b, check, &mut numbers, [3, 65, 509]);
    for sizes in [
        [2, 3, 8],
        [3, 2, 1028],
        [2, 3, 2056],
        [67, 2, 12],
        [130, 1, 3],
    ] {
        prefixes(b, check, &mut numbers, sizes);
    }
    statistics(b, check);
}

fn spans_of(lens: &[usize]) -> Vec<Span> {
    let mut start = 0;
    let mut spans = Vec::new();
    for &len in lens {
        spans.push(Span {
            q_start: start,
            q_len: len,
            kv_start: start,
            kv_len: len,
            context_length: 0,
        });
        start += len;
    }
    spans
}

fn activations<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    lens: &[usize],
    cols: usize,
    p: f32,
) {
    let spans = spans_of(lens);
    let rows: usize = lens.iter().sum();
    let key = prefix_key();
    let dropout = Dropout { p, key };
    let mut masks = Vec::new();
    for (sequence, &len) in lens.iter().enumerate() {
        for at in 0..len * cols {
            masks.push(mask(p, sequence, at / cols, at % cols));
        }
    }
    let label = format!("sequences {lens:?}, cols {cols}, p {p}");

    let x = Act::<B>::of(b, &numbers.values(rows * cols));
    let mut out = Act::<B>::blank(b, rows * cols);
    check.run(b, "dropout", label.clone(), &[&x], || {
        b.dropout(&mut out.device, &x.device, dropout, &spans, cols)
    });
    let x = x.values();
    check.expect(b, &out, || {
        let pairs = x.iter().zip(&masks);
        pairs.map(|(x, mask)| Exact::sum([x * mask])).collect()
    });

    let dout = Act::<B>::of(b, &numbers.values(rows * cols));
    let mut dx = Act::<B>::target(b, &numbers.values(rows * cols));
    let before = dx.values();
    check.run(b, "dropout_backward", label.clone(), &[&dout], || {
        b.dropout_backward(&mut dx.device, &dout.device, dropout, &spans, cols)
    });
    let c = dout.values();
    check.expect(b, &dx, || {
        (0..rows * cols)
            .map(|at| Exact::sum([before[at], masks[at] * c[at]]))
            .collect()
    });

    if rows * cols > 97 * 97 || masks.iter().all(|&mask| mask == 0.0) {
        return;
    }
    let mut dx = Act::<B>::target(b, &vec![0.0; rows * cols]);
    b.dropout_backward(&mut dx.device, &dout.device, dropout, &spans, cols)
        .unwrap();
    let functional = |p: &[Vec<f64>]| {
        let terms = p[0].iter().zip(&masks).zip(&c);
        terms.map(|((x, mask), c)| x * mask * c).sum()
    };
    let own = |b: &B, p: &[Vec<f64>]| {
        let x = Act::<B>::of(b, &p[0]);
        let mut out = Act::<B>::blank(b, rows * cols);
        b.dropout(&mut out.device, &x.device, dropout, &spans, cols)
            .unwrap();
        dot(&c, &out.result(b))
    };
    let gradient = dx.result(b);
    let op = "dropout_backward";
    check.gradient(b, op, label, &[&x], &[&gradient], functional, own);
}

fn prefixes<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    [sequences, len, cols]: [usize; 3],
) {
    let dropout = Dropout {
        p: keep_p(),
        key: prefix_key(),
    };
    let width = len * cols;
    let mask = |at: usize| {
        let (sequence, rest) = (at / width, at % width);
        mask_of(sequence, rest / cols, rest % cols)
    };
    let label = format!("sequences {sequences}, prefix {len}, cols {cols}");

    let x = Act::<B>::of(b, &numbers.values(width));
    let mut out = Act::<B>::blank(b, sequences * width);
    check.run(b, "prefix_dropout", label.clone(), &[&x], || {
        b.prefix_dropout(&mut out.device, &x.device, dropout, sequences, len, cols)
    });
    let x = x.values();
    check.expect(b, &out, || {
        (0..sequences * width)
            .map(|at| Exact::sum([x[at % width] * mask(at)]))
            .collect()
    });

    for with_dropout in [Some(dropout), None] {
        let label = format!("{label}, dropout {}", with_dropout.is_some());
        let dout = Buf::<B, f32>::of(b, &numbers.values(sequences * width));
        let mut dx = Buf::<B, f32>::target(b, &numbers.values(width));
        let (before, c) = (dx.values(), dout.values());
        check.run(b, "prefix_gradient", label, &[&dout], || {
            b.prefix_gradient(
                &mut dx.device,
                &dout.device,
                with_dropout,
                sequences,
                len,
                cols,
            )
        });
        check.expect(b, &dx, || {
            (0..width)
                .map(|at| {
                    let terms = (0..sequences).map(|sequence| {
                        let at = sequence * width + at;
                        c[at] * with_dropout.map_or(1.0, |_| mask(at))
                    });
                    Exact::sum(terms.chain([before[at]]))
                })
                .collect()
        });
    }
}

/// The rate of zeros and the mean over many elements, and how masks of different keys, sequences
/// and tokens agree. Bounds are five standard deviations.
fn statistics<B: Backend>(b: &B, check: &mut Check) {
    const ROWS: usize = 128;
    const COLS: usize = 512;
    const COUNT: f64 = (2 * ROWS * COLS) as f64;
    let spans = spans_of(&[ROWS, ROWS]);
    let ones = Act::<B>::of(b, &[1.0; 2 * ROWS * COLS]);
    for p in [0.05f32, 0.1, 0.5] {
        let mut kept = |key: Key| -> Vec<bool> {
            let dropout = Dropout { p, key };
            let mut out = Act::<B>::blank(b, 2 * ROWS * COLS);
            check.run(b, "dropout", format!("statistics, p {p}"), &[&ones], || {
                b.dropout(&mut out.device, &ones.device, dropout, &spans, COLS)
            });
            let out = out.result(b);
            let mean = out.iter().sum::<f64>() / COUNT;
            let p = f64::from(p);
            if (mean - 1.0).abs() > 5.0 * (p / (1.0 - p) / COUNT).sqrt() + 5e-4 {
                check.fail(&format!("the mean of ones became {mean}"));
            }
            let zeros = out.iter().filter(|&&x| x == 0.0).count() as f64 / COUNT;
            if (zeros - p).abs() > 5.0 * (p * (1.0 - p) / COUNT).sqrt() {
                check.fail(&format!("the rate of zeros is {zeros}"));
            }
            out.iter().map(|&x| x != 0.0).collect()
        };
        let key = Key::new(SEED, Domain::LoraDropout);
        let first = kept(key);
        let again = kept(key);
        let other_key = kept(key.fold(1));
        if first != again {
            check.fail("the same key gave another mask");
        }
        // Independent masks agree where both keep or both drop.
        let (kept_share, dropped_share) = (1.0 - f64::from(p), f64::from(p));
        let expected = kept_share * kept_share + dropped_share * dropped_share;
        let pairs: [(&str, &[bool], &[bool]); 4] = [
            ("keys", &first, &other_key),
            ("sequences", &first[..ROWS * COLS], &first[ROWS * COLS..]),
            ("tokens", &first[..ROWS * COLS], &first[COLS..ROWS * COLS]),
            ("columns", &first, &first[1..]),
        ];
        for (what, a, b) in pairs {
            let pairs = a.iter().zip(b);
            let count = pairs.len() as f64;
            let agreement = pairs.filter(|(a, b)| a == b).count() as f64 / count;
            if (agreement - expected).abs() > 5.0 * (0.25 / count).sqrt() {
                check.fail(&format!("masks of different {what} agree at {agreement}"));
            }
        }
    }
}
