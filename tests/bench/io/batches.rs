//! Micro-batches out of the token cache, as the thread makes them that works ahead of the steps.

use std::path::Path;

use mp_train::data::batch::MicroBatch;
use mp_train::data::sampler::{Batching, Order, Sampler, SamplerState};

use crate::figures::{Report, seconds};
use crate::tokenising::{cached, sentence_piece, write_rows};

const STEPS: usize = 2_000;

pub fn made(report: &mut Report, folder: &Path) {
    let path = write_rows(folder);
    let cache = tempfile::tempdir_in(folder).unwrap();
    let rows = cached(&path, cache.path(), &sentence_piece(), report.threads).rows;
    let steps = |micro_batches: usize, size: usize| {
        let order = Order::Shuffled { seed: 1 };
        let batching = Batching::rows(size);
        let mut sampler = Sampler::over(&rows, batching, order, SamplerState::default()).unwrap();
        let mut next = || {
            let picked = sampler.next_micro_batch().into_iter();
            MicroBatch::from_rows(picked.filter_map(|index| rows.get(index)))
        };
        seconds(|| {
            for _ in 0..STEPS * micro_batches {
                std::hint::black_box(next());
            }
        })
    };
    let steps = &steps;
    report.in_turn(
        "micro-batches of shuffled rows",
        STEPS as f64,
        "steps",
        vec![
            (
                "1 micro-batch of 1 row".to_owned(),
                Box::new(move || steps(1, 1)),
            ),
            (
                "1 micro-batch of 4 rows".to_owned(),
                Box::new(move || steps(1, 4)),
            ),
            (
                "16 micro-batches of 4 rows".to_owned(),
                Box::new(move || steps(16, 4)),
            ),
        ],
    );
}
