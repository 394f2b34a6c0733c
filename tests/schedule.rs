//! Schedules and partitions: properties over all sizes, and the validator against planted faults.
#![allow(clippy::unwrap_used)]

use mp_train::config::model::ModelConfig;
use mp_train::config::run::{Quantization, Recompute, ScheduleKind};
use mp_train::pipeline::partition::{self, PartitionError, StageSpec};
use mp_train::pipeline::schedule::Action::{Backward as B, Forward as F};
use mp_train::pipeline::schedule::{Schedule, ScheduleError, Transfers};

const KINDS: [ScheduleKind; 2] = [ScheduleKind::OneForwardOneBackward, ScheduleKind::Gpipe];

#[test]
fn every_generated_schedule_validates_and_keeps_its_promises() {
    for stages in 1..=28 {
        for micro_batches in 1..=64 {
            for kind in KINDS {
                let schedule = Schedule::build(kind, stages, micro_batches);
                let what = format!("{kind:?}, {stages} stages, {micro_batches} micro-batches");
                assert_eq!(schedule.validate(), Ok(()), "{what}");
                for rank in 0..stages {
                    let expected = match kind {
                        ScheduleKind::OneForwardOneBackward => micro_batches.min(stages - rank),
                        ScheduleKind::Gpipe => micro_batches,
                    };
                    assert_eq!(schedule.slots(rank), expected, "{what}, rank {rank}");
                    let actions = &schedule.stages[rank];
                    let backwards = actions.iter().filter(|a| matches!(a, B(_)));
                    assert!(
                        backwards.map(|a| a.micro_batch()).eq(0..micro_batches),
                        "{what}"
                    );
                }
            }
        }
    }
}

#[test]
fn idle_time_is_that_of_the_formula() {
    for stages in 1..=9 {
        for micro_batches in 1..=20 {
            let expected = (stages - 1) as f64 / (micro_batches + stages - 1) as f64;
            for kind in KINDS {
                let schedule = Schedule::build(kind, stages, micro_batches);
                for (forward, backward) in [(1, 1), (1, 2), (2, 3), (3, 1)] {
                    let idle = schedule.idle_fraction(forward, backward);
                    assert!(
                        (idle - expected).abs() < 1e-12,
                        "{schedule:?}: {idle} {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_grid_is_drawn_to_time() {
    let expected = "\
stage 0 | F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
stage 1 | .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
stage 2 | .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .
";
    assert_eq!(
        Schedule::one_forward_one_backward(3, 4).grid(1, 1),
        expected
    );
    let expected = "\
stage 0 | F0 F1 .  .  .  B0 -- B1 --
stage 1 | .  F0 F1 B0 -- B1 -- .  .
";
    assert_eq!(Schedule::gpipe(2, 2).grid(1, 2), expected);
}

fn planted(kind: ScheduleKind, stages: &[&[mp_train::pipeline::schedule::Action]]) -> Schedule {
    let micro_batches = stages
        .iter()
        .flat_map(|s| s.iter())
        .map(|a| a.micro_batch() + 1);
    Schedule {
        kind,
        micro_batches: micro_batches.max().unwrap_or(0),
        stages: stages.iter().map(|s| s.to_vec()).collect(),
    }
}

#[test]
fn the_validator_finds_every_planted_fault() {
    let [one, gpipe] = KINDS;
    let found = |kind, stages: &[&[_]]| planted(kind, stages).validate();

    assert_eq!(found(one, &[]), Err(ScheduleError::Empty));
    assert_eq!(found(one, &[&[], &[]]), Err(ScheduleError::Empty));

    let mut beyond = Schedule::gpipe(2, 2);
    beyond.stages[1].push(F(2));
    let error = ScheduleError::OutOfRange {
        rank: 1,
        action: F(2),
        micro_batches: 2,
    };
    assert_eq!(beyond.validate(), Err(error));

    let twice: &[_] = &[F(0), B(0), F(0)];
    let error = ScheduleError::Repeated {
        rank: 0,
        action: F(0),
    };
    assert_eq!(found(one, &[twice]), Err(error));

    let absent: &[_] = &[F(0), F(1), B(0)];
    let error = ScheduleError::Missing {
        rank: 0,
        action: B(1),
    };
    assert_eq!(found(gpipe, &[absent]), Err(error));

    let early: &[_] = &[F(0), B(1), F(1), B(0)];
    let error = ScheduleError::BackwardFirst {
        rank: 0,
        micro_batch: 1,
    };
    assert_eq!(found(gpipe, &[early]), Err(error));

    let straight: &[_] = &[F(0), F(1), B(0), B(1)];
    let crossed: &[_] = &[F(1), F(0), B(0), B(1)];
    let error = ScheduleError::Unmatched {
        from: 0,
        to: 1,
        sent: F(0),
        awaited: F(1),
    };
    assert_eq!(found(gpipe, &[straight, crossed]), Err(error));
    let crossed: &[_] = &[F(0), F(1), B(1), B(0)];
    let error = ScheduleError::Unmatched {
        from: 1,
        to: 0,
        sent: B(1),
        awaited: B(0),
    };
    assert_eq!(found(gpipe, &[straight, crossed]), Err(error));

    // GPipe as the paper draws it, backwards in descending order: runs, but adds up differently.
    let descending: &[_] = &[F(0), F(1), B(1), B(0)];
    let error = ScheduleError::NotAscending {
        rank: 0,
        earlier: B(1),
        later: B(0),
    };
    assert_eq!(found(gpipe, &[descending, descending]), Err(error));

    // Stage 0 wants B0 back before it hands out F1, stage 1 wants F1 before it starts on B0.
    let impatient: &[_] = &[F(0), B(0), F(1), B(1)];
    let error = ScheduleError::Deadlock {
        transfers: Transfers::Buffered,
        rank: 0,
        action: B(0),
    };
    assert_eq!(found(gpipe, &[impatient, straight]), Err(error));

    // Fine as long as sends are buffered: but stage 1 cannot get rid of B0 while stage 0 only sends.
    let busy = &Schedule::gpipe(1, 4).stages[0];
    let alternating = &Schedule::one_forward_one_backward(1, 4).stages[0];
    let mixed = planted(gpipe, &[busy, alternating]);
    assert_eq!(mixed.simulate(Transfers::Buffered), Ok(()));
    let error = ScheduleError::Deadlock {
        transfers: Transfers::GroupedRendezvous,
        rank: 0,
        action: F(2),
    };
    assert_eq!(mixed.validate(), Err(error));

    let mut greedy = Schedule::gpipe(3, 4);
    greedy.kind = one;
    let error = ScheduleError::Slots {
        rank: 0,
        used: 4,
        allowed: 3,
    };
    assert_eq!(greedy.validate(), Err(error));
}

/// Why sends and receives of one neighbour are grouped: without that 1f1b stops for ever as soon as
/// two neighbours send to each other.
#[test]
fn one_forward_one_backward_needs_grouped_transfers() {
    let schedule = Schedule::one_forward_one_backward(2, 3);
    assert_eq!(schedule.simulate(Transfers::GroupedRendezvous), Ok(()));
    assert!(matches!(
        schedule.simulate(Transfers::PlainRendezvous),
        Err(ScheduleError::Deadlock {
            transfers: Transfers::PlainRendezvous,
            ..
        })
    ));
}

#[test]
fn drawing_a_schedule_that_cannot_run_ends() {
    let stuck = planted(
        KINDS[1],
        &[&[F(0), B(0), F(1), B(1)], &[F(0), F(1), B(0), B(1)]],
    );
    assert_eq!(stuck.grid(1, 1), "stage 0 | F0 .\nstage 1 | .  F0\n");
}

fn chatglm_6b() -> ModelConfig {
    ModelConfig {
        vocab_size: 130_528,
        hidden_size: 4096,
        inner_hidden_size: 16_384,
        num_attention_heads: 32,
        num_layers: 28,
        layernorm_epsilon: 1e-5,
        max_sequence_length: 2048,
        bos_token_id: 130_004,
        eos_token_id: 130_005,
        mask_token_id: 130_000,
        gmask_token_id: 130_001,
        pad_token_id: Some(3),
        tie_word_embeddings: true,
        pre_seq_len: None,
        prefix_projection: false,
        quantization: Quantization::None,
    }
}

fn sizes(specs: &[StageSpec]) -> Vec<usize> {
    specs.iter().map(|spec| spec.blocks.len()).collect()
}

#[test]
fn the_head_of_chatglm_6b_is_worth_what_the_design_says() {
    let cost = |share, recompute, trained| {
        let cost = partition::head_cost(&chatglm_6b(), share, recompute, trained);
        (cost * 1000.0).round() / 1000.0
    };
    assert_eq!(cost(1.0, Recompute::None, false), 2.656);
    assert_eq!(cost(1.0, Recompute::Auto, false), 2.656);
    assert_eq!(cost(1.0, Recompute::Block, false), 1.770);
    assert_eq!(cost(1.0, Recompute::AttentionFree, false), 2.276);
    assert_eq!(cost(1.0, Recompute::None, true), 2.656);
    assert_eq!(cost(1.0, Recompute::Block, true), 1.992);
    assert_eq!(cost(0.5, Recompute::None, false), 1.328);
    assert_eq!(cost(0.0, Recompute::Block, false), 0.0);
}

#[test]
fn chatglm_6b_is_split_as_the_design_says() {
    let split = |stages, share| {
        let head = partition::head_cost(&chatglm_6b(), share, Recompute::None, false);
        sizes(&partition::by_cost(28, stages, head).unwrap())
    };
    assert_eq!(split(1, 1.0), [28]);
    assert_eq!(split(2, 1.0), [15, 13]);
    assert_eq!(split(3, 1.0), [10, 10, 8]);
    assert_eq!(split(4, 1.0), [8, 8, 7, 5]);
    assert_eq!(split(2, 1.0 / 3.0), [14, 14]);
    assert_eq!(split(3, 1.0 / 3.0), [10, 9, 9]);
    assert_eq!(split(4, 1.0 / 3.0), [7, 7, 7, 7]);
    // At a half the head is worth more than a block, and one block moves away from it.
    assert_eq!(split(2, 0.5), [15, 13]);
    assert_eq!(split(3, 0.5), [10, 10, 8]);
    assert_eq!(split(4, 0.5), [8, 7, 7, 6]);
    assert_eq!(split(28, 1.0), [1; 28]);
}

/// Every way to deal out the blocks.
fn all_splits(blocks: usize, stages: usize) -> Vec<Vec<usize>> {
    if stages == 1 {
        return vec![vec![blocks]];
    }
    let firsts = 1..=blocks - (stages - 1);
    let with = |first: usize| {
        all_splits(blocks - first, stages - 1)
            .into_iter()
            .map(move |rest| [vec![first], rest].concat())
    };
    firsts.flat_map(with).collect()
}

#[test]
fn no_other_split_is_better_than_the_one_by_cost() {
    for blocks in 1..=10 {
        for stages in 1..=blocks.min(6) {
            for head in [0.0, 0.4, 1.0, 1.328, 2.656, 40.0] {
                let specs = partition::by_cost(blocks, stages, head).unwrap();
                let score = |specs: &[StageSpec]| {
                    let costs: Vec<f64> = specs.iter().map(|spec| spec.cost(head)).collect();
                    let worst = costs.iter().copied().fold(0.0, f64::max);
                    (worst, costs.iter().map(|cost| cost * cost).sum::<f64>())
                };
                let (worst, squares) = score(&specs);
                for other in all_splits(blocks, stages) {
                    let (least, evenest) = score(&partition::from_balance(&other, blocks).unwrap());
                    let beaten = least < worst || (least == worst && evenest < squares - 1e-9);
                    assert!(
                        !beaten,
                        "{:?} beats {:?}, head {head}",
                        other,
                        sizes(&specs)
                    );
                }
            }
        }
    }
}

#[test]
fn stages_are_contiguous_and_know_their_ends() {
    let specs = partition::from_balance(&[2, 1, 3], 6).unwrap();
    let ranges: Vec<_> = specs.iter().map(|spec| spec.blocks.clone()).collect();
    assert_eq!(ranges, [0..2, 2..3, 3..6]);
    let ends: Vec<_> = specs
        .iter()
        .map(|spec| (spec.embedding, spec.head))
        .collect();
    assert_eq!(ends, [(true, false), (false, false), (false, true)]);
    assert!(
        specs
            .iter()
            .enumerate()
            .all(|(rank, spec)| (spec.rank, spec.stages) == (rank, 3))
    );
    let alone = &partition::by_cost(4, 1, 2.0).unwrap()[0];
    assert!(alone.embedding && alone.head);
}

#[test]
fn impossible_partitions_are_refused() {
    let error = |balance: &[usize]| partition::from_balance(balance, 4).unwrap_err();
    assert_eq!(error(&[]), PartitionError::NoStages);
    assert_eq!(
        error(&[1; 5]),
        PartitionError::TooManyStages {
            stages: 5,
            num_layers: 4
        }
    );
    let empty = PartitionError::EmptyStage {
        balance: vec![4, 0],
        rank: 1,
    };
    assert_eq!(error(&[4, 0]), empty);
    for balance in [vec![2, 3], vec![1, 2], vec![usize::MAX, 5]] {
        let text = error(&balance).to_string();
        assert!(text.contains("the model has 4"), "{text}");
    }
    assert_eq!(partition::by_cost(4, 0, 1.0), Err(PartitionError::NoStages));
    let many = PartitionError::TooManyStages {
        stages: 5,
        num_layers: 4,
    };
    assert_eq!(partition::by_cost(4, 5, 1.0), Err(many));
}
