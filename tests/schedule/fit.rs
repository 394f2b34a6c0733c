//! Blocks dealt out by cost among the splits that fit.

use std::cell::Cell;
use std::ops::Range;

use mp_train::pipeline::partition::{self, StageSpec};

use super::partition::{all_splits, sizes};

/// Blocks of 10 units; the first stage has 12 more to hold, the last 25; `room` per stage.
fn fits_into(room: &[usize]) -> impl Fn(usize, &[Range<usize>]) -> bool + '_ {
    move |rank, chunks| {
        let blocks: usize = chunks.iter().map(Range::len).sum();
        let first = if rank == 0 { 12 } else { 0 };
        let last = if rank + 1 == room.len() { 25 } else { 0 };
        10 * blocks + first + last <= room[rank]
    }
}

fn score(specs: &[StageSpec], head: f64) -> (f64, f64) {
    let costs: Vec<f64> = specs.iter().map(|spec| spec.cost(head)).collect();
    let worst = costs.iter().copied().fold(0.0, f64::max);
    (worst, costs.iter().map(|cost| cost * cost).sum())
}

/// Small numbers that look random and are always the same.
fn rooms(count: usize, seed: usize) -> Vec<usize> {
    let room = |rank: usize| 20 + (seed * 7919 + rank * 104_729 + seed * rank * 31) % 70;
    (0..count).map(room).collect()
}

#[test]
fn no_split_that_fits_is_better_than_the_one_found() {
    let (mut found, mut none) = (0, 0);
    for blocks in 1..=9 {
        for stages in 1..=blocks.min(5) {
            for head in [0.0, 1.328, 2.656] {
                for seed in 0..12 {
                    let room = rooms(stages, seed + blocks);
                    let fits = fits_into(&room);
                    let all = all_splits(blocks, stages);
                    let fitting = all
                        .iter()
                        .map(|sizes| partition::from_balance(sizes, blocks, 1).unwrap())
                        .filter(|specs| specs.iter().all(|spec| fits(spec.rank, &spec.chunks)));
                    let best = fitting.map(|specs| score(&specs, head)).min_by(|a, b| {
                        let close = (a.1 - b.1).abs() < 1e-9;
                        let squares = if close { 0.0 } else { a.1 - b.1 };
                        a.0.total_cmp(&b.0).then(squares.total_cmp(&0.0))
                    });
                    let specs = partition::by_cost_and_fit(blocks, stages, 1, head, &fits).unwrap();
                    match (&specs, best) {
                        (None, None) => none += 1,
                        (Some(specs), Some((worst, squares))) => {
                            found += 1;
                            assert!(specs.iter().all(|spec| fits(spec.rank, &spec.chunks)));
                            let (own_worst, own_squares) = score(specs, head);
                            let what = format!("{:?}, room {room:?}, head {head}", sizes(specs));
                            assert_eq!(own_worst, worst, "{what}");
                            assert!((own_squares - squares).abs() < 1e-9, "{what}");
                        }
                        _ => panic!("{blocks} blocks, {room:?}: {specs:?}, best {best:?}"),
                    }
                }
            }
        }
    }
    assert!(found > 300 && none > 300, "{found} found, {none} without");
}

#[test]
fn with_room_for_everything_it_is_the_split_by_cost() {
    for stages in 1..=28 {
        for virtual_stages in 1..=28 / stages {
            for head in [0.0, 1.328, 2.656] {
                let by_cost = partition::by_cost(28, stages, virtual_stages, head).unwrap();
                let asked = Cell::new(0);
                let fits = |rank: usize, chunks: &[Range<usize>]| {
                    asked.set(asked.get() + 1);
                    assert!(rank < stages && chunks.iter().all(|blocks| !blocks.is_empty()));
                    assert_eq!(rank == 0, chunks[0].start == 0);
                    let last = chunks.last().unwrap().end;
                    assert_eq!(rank + 1 == stages, last == 28);
                    true
                };
                let split =
                    partition::by_cost_and_fit(28, stages, virtual_stages, head, &fits).unwrap();
                assert_eq!(split, Some(by_cost));
                assert!(asked.get() <= 6 * stages, "{} questions", asked.get());
            }
        }
    }
}

/// A card that is too small for its share by cost gives blocks away, to the others evenly.
#[test]
fn what_does_not_fit_goes_to_the_others() {
    let small_second = |rank: usize, chunks: &[Range<usize>]| {
        rank != 1 || chunks.iter().map(Range::len).sum::<usize>() <= 4
    };
    let split = |virtual_stages| {
        partition::by_cost_and_fit(28, 4, virtual_stages, 1.0, &small_second)
            .unwrap()
            .map(|specs| sizes(&specs))
    };
    assert_eq!(split(1), Some(vec![9, 4, 8, 7]));
    assert_eq!(split(4), Some(vec![9, 4, 8, 7]));
    // Five chunks need five blocks.
    assert_eq!(split(5), None);
    let nowhere = |_: usize, _: &[Range<usize>]| false;
    assert_eq!(
        partition::by_cost_and_fit(28, 3, 1, 0.0, &nowhere),
        Ok(None)
    );
    assert_eq!(
        partition::by_cost_and_fit(28, 1, 1, 0.0, &nowhere),
        Ok(None)
    );
    assert!(partition::by_cost_and_fit(28, 29, 1, 0.0, &nowhere).is_err());
}
