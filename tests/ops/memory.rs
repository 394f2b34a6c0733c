//! Buffers, casts and sums of buffers.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use mp_train::backend::{Backend, BackendError, Element, PIECE_BYTES, Plain};

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::numbers::{Exact, Numbers};

/// The last one is cut between threads.
const LENGTHS: [usize; 6] = [0, 1, 3, 65, 97, 40_001];

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(1);
    for len in LENGTHS {
        let words: Vec<u32> = (0..len).map(|_| numbers.word() as u32).collect();
        let floats: Vec<f32> = words.iter().map(|&word| f32::from_bits(word)).collect();
        let halves: Vec<f16> = words
            .iter()
            .map(|&word| f16::from_bits(word as u16))
            .collect();
        transfers(b, check, &words, "u32");
        transfers(b, check, &floats, "f32");
        transfers(b, check, &halves, "f16");
        cast::<B, f32>(b, check, &mut numbers, len);
        cast::<B, B::Element>(b, check, &mut numbers, len);

        let x = Buf::<B, f32>::of(b, &numbers.values(len));
        let mut out = Buf::<B, f32>::target(b, &numbers.values(len));
        let (before, added) = (out.values(), x.values());
        check.run(b, "add", format!("len {len}"), &[&x], || {
            b.add(&mut out.device, &x.device, len)
        });
        check.expect(b, &out, || {
            let pairs = before.iter().zip(&added);
            pairs.map(|(&a, &b)| Exact::sum([a, b])).collect()
        });
    }
    extreme_casts(b, check);
    // Nothing, one value, less than a piece, and so many pieces that a ring of them goes round; in
    // rows, too, and in rows that are longer than a piece.
    for (len, unit) in [
        (0, 1),
        (1, 1),
        (40_001, 1),
        (1_800_003, 1),
        (48 * 33_000, 48),
        (3 * 300_001, 300_001),
    ] {
        let words: Vec<u32> = (0..len).map(|_| numbers.word() as u32).collect();
        pieces(b, check, &words, unit);
        let bytes: Vec<i8> = words.iter().map(|&word| word as i8).collect();
        pieces(b, check, &bytes, unit);
    }
}

fn pieces<B: Backend, T: Plain>(b: &B, check: &mut Check, host: &[T], unit: usize) {
    let (len, size) = (host.len(), size_of::<T>());
    let label = format!("{len} values of {size} bytes in units of {unit}");
    check.run(b, "upload_pieces", label, &[], || Ok(()));
    let done = AtomicUsize::new(0);
    let uploaded = b
        .upload_pieces(len, unit, |start, out: &mut [T]| {
            assert!(!out.is_empty() && out.len().is_multiple_of(unit));
            assert!(out.len() == unit || out.len() * size <= PIECE_BYTES);
            out.copy_from_slice(&host[start..start + out.len()]);
            done.fetch_add(out.len(), Ordering::Relaxed);
            Ok::<_, BackendError>(())
        })
        .unwrap();
    assert_eq!(done.into_inner(), len);
    check.expect_bits(&b.read(&uploaded, len).unwrap(), host);

    // A piece that cannot be had is the caller's own error: that of the first one, even where another
    // thread comes to a later one sooner.
    let refused = b.upload_pieces(len, unit, |start, _: &mut [T]| {
        if start == 0 {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        Err::<(), _>(NoPiece::At(start))
    });
    match (refused, len) {
        (Ok(_), 0) | (Err(NoPiece::At(0)), 1..) => {}
        _ => check.fail("the error of the first piece was lost"),
    }
    // What comes behind a failure is whole.
    let uploaded = b.upload(host).unwrap();
    check.expect_bits(&b.read(&uploaded, len).unwrap(), host);
}

/// An error of whoever fills pieces, or of the device.
enum NoPiece {
    At(usize),
    Device,
}

impl From<BackendError> for NoPiece {
    fn from(_: BackendError) -> Self {
        NoPiece::Device
    }
}

fn transfers<B: Backend, T: Plain>(b: &B, check: &mut Check, host: &[T], name: &str) {
    let len = host.len();
    let label = format!("{len} x {name}");
    let head = len / 3;

    check.run(b, "zeros", label.clone(), &[], || Ok(()));
    let zeros = b.zeros::<T>(len).unwrap();
    check.expect_bits(&b.read(&zeros, len).unwrap(), &vec![T::zeroed(); len]);

    check.run(b, "upload", label.clone(), &[], || Ok(()));
    let uploaded = b.upload(host).unwrap();
    check.run(b, "read", label.clone(), &[], || Ok(()));
    check.expect_bits(&b.read(&uploaded, len).unwrap(), host);
    check.expect_bits(&b.read(&uploaded, head).unwrap(), &host[..head]);

    let mut out = Buf::<B, T>::blank(b, len);
    check.run(b, "write", label.clone(), &[], || {
        b.write(&mut out.device, &host[..head])
    });
    let mut expected = out.before().to_vec();
    expected[..head].copy_from_slice(&host[..head]);
    check.expect_bits(&out.after(b), &expected);

    let mut out = Buf::<B, T>::host_target(b, host);
    check.run(b, "clear", label, &[], || b.clear(&mut out.device, head));
    let mut expected = out.before().to_vec();
    expected[..head].fill(T::zeroed());
    check.expect_bits(&out.after(b), &expected);
}

fn cast<B: Backend, T: Element>(b: &B, check: &mut Check, numbers: &mut Numbers, len: usize) {
    let x = Buf::<B, f32>::of(b, &numbers.around(0.0, 300.0, len));
    let mut out = Buf::<B, T>::blank(b, len);
    let label = format!("len {len} to {}", T::NAME);
    check.run(b, "cast", label, &[&x], || {
        b.cast(&mut out.device, &x.device, len)
    });
    let values = x.values();
    check.expect(b, &out, || {
        values.iter().map(|&x| Exact::new(x, 0.0)).collect()
    });
}

/// Ties, subnormals, the largest values, infinities: bit for bit, against the bits they must have.
fn extreme_casts<B: Backend>(b: &B, check: &mut Check) {
    let table: [(f32, u16); 20] = [
        (0.0, 0x0000),
        (-0.0, 0x8000),
        (1.0 + 0.5 / 1024.0, 0x3c00), // tie, to even below
        (1.0 + 1.5 / 1024.0, 0x3c02), // tie, to even above
        (1.0 + 0.501 / 1024.0, 0x3c01),
        (-1.0 - 1.5 / 1024.0, 0xbc02),
        (65_504.0, 0x7bff),
        (65_519.0, 0x7bff),
        (65_520.0, 0x7c00), // tie, to infinity
        (-65_520.0, 0xfc00),
        (1e30, 0x7c00),
        (f32::INFINITY, 0x7c00),
        (f32::NEG_INFINITY, 0xfc00),
        (6.103_515_6e-5, 0x0400), // smallest normal
        (6.097_555e-5, 0x03ff),   // largest subnormal
        (5.960_464_5e-8, 0x0001), // smallest subnormal
        (2.980_232_2e-8, 0x0000), // tie, to zero
        (2.980_233e-8, 0x0001),
        (8.940_697e-8, 0x0002), // tie, to even
        (-1e-30, 0x8000),
    ];
    let len = table.len();
    let x = Buf::<B, f32>::host(b, &table.map(|(x, _)| x));
    let mut out = Buf::<B, f16>::blank(b, len);
    check.run(b, "cast", "extremes to f16".to_owned(), &[&x], || {
        b.cast(&mut out.device, &x.device, len)
    });
    let mut expected = out.before().to_vec();
    for (out, (_, bits)) in expected.iter_mut().zip(table) {
        *out = f16::from_bits(bits);
    }
    check.expect_bits(&out.after(b), &expected);

    let nan = b.upload(&[f32::NAN]).unwrap();
    let mut out = Act::<B>::target(b, &[0.0]);
    check.run(b, "cast", "NaN".to_owned(), &[], || {
        b.cast(&mut out.device, &nan, 1)
    });
    if !out.result(b)[0].is_nan() {
        check.fail("NaN became a number");
    }
}
