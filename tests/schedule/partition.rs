//! Blocks dealt out by cost and by hand.

use mp_train::config::model::ModelConfig;
use mp_train::config::run::{Quantization, Recompute};
use mp_train::pipeline::partition::{self, PartitionError, StageSpec};

pub fn chatglm_6b() -> ModelConfig {
    ModelConfig {
        vocab_size: 130_528,
        hidden_size: 4096,
        inner_hidden_size: 16_384,
        architecture: mp_train::config::architecture::Architecture::CHATGLM,
        num_attention_heads: 32,
        num_key_value_heads: 32,
        head_dim: 128,
        num_layers: 28,
        norm_epsilon: 1e-5,
        max_sequence_length: 2048,
        context_ids: Some(mp_train::config::model::ContextIds {
            bos_token_id: 130_004,
            mask_token_id: 130_000,
            gmask_token_id: 130_001,
        }),
        eos_token_ids: vec![130_005],
        pad_token_id: Some(3),
        tie_word_embeddings: true,
        pre_seq_len: None,
        prefix_projection: false,
        quantization: Quantization::None,
    }
}

pub fn sizes(specs: &[StageSpec]) -> Vec<usize> {
    specs.iter().map(|spec| spec.num_blocks()).collect()
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
pub fn chatglm_6b_is_split_as_the_design_says() {
    let split = |stages, share| {
        let head = partition::head_cost(&chatglm_6b(), share, Recompute::None, false);
        sizes(&partition::by_cost(28, stages, 1, head).unwrap())
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
pub fn all_splits(blocks: usize, stages: usize) -> Vec<Vec<usize>> {
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
                let specs = partition::by_cost(blocks, stages, 1, head).unwrap();
                let score = |specs: &[StageSpec]| {
                    let costs: Vec<f64> = specs.iter().map(|spec| spec.cost(head)).collect();
                    let worst = costs.iter().copied().fold(0.0, f64::max);
                    (worst, costs.iter().map(|cost| cost * cost).sum::<f64>())
                };
                let (worst, squares) = score(&specs);
                for other in all_splits(blocks, stages) {
                    let (least, evenest) =
                        score(&partition::from_balance(&other, blocks, 1).unwrap());
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
    let specs = partition::from_balance(&[2, 1, 3], 6, 1).unwrap();
    let ranges: Vec<_> = specs.iter().map(|spec| spec.chunks[0].clone()).collect();
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
    let alone = &partition::by_cost(4, 1, 1, 2.0).unwrap()[0];
    assert!(alone.embedding && alone.head);
}

#[test]
fn impossible_partitions_are_refused() {
    let error = |balance: &[usize]| partition::from_balance(balance, 4, 1).unwrap_err();
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
    assert_eq!(
        partition::by_cost(4, 0, 1, 1.0),
        Err(PartitionError::NoStages)
    );
    let many = PartitionError::TooManyStages {
        stages: 5,
        num_layers: 4,
    };
    assert_eq!(partition::by_cost(4, 5, 1, 1.0), Err(many));
}

fn chunks(specs: &[StageSpec]) -> Vec<Vec<usize>> {
    let lens = |spec: &StageSpec| spec.chunks.iter().map(|blocks| blocks.len()).collect();
    specs.iter().map(lens).collect()
}

#[test]
fn chunks_go_round_the_stages() {
    let specs = partition::by_cost(28, 4, 7, 0.0).unwrap();
    for spec in &specs {
        assert_eq!(spec.num_blocks(), 7);
        let own: Vec<usize> = (0..7).map(|chunk| chunk * 4 + spec.rank).collect();
        assert_eq!(spec.blocks().collect::<Vec<_>>(), own);
        assert!(spec.chunks.iter().all(|blocks| blocks.len() == 1));
    }
    // Full head cost: the stages as without chunks, and the last chunk of all the smallest.
    let head = partition::head_cost(&chatglm_6b(), 1.0, Recompute::None, false);
    let specs = partition::by_cost(28, 4, 2, head).unwrap();
    assert_eq!(
        chunks(&specs),
        [vec![4, 4], vec![4, 4], vec![4, 3], vec![4, 1]]
    );
    assert_eq!(specs[0].chunks, [0..4, 16..20]);
    assert_eq!(specs[3].chunks, [12..16, 27..28]);
    let specs = partition::from_balance(&[3, 5], 8, 2).unwrap();
    assert_eq!(specs[0].chunks, [0..2, 5..6]);
    assert_eq!(specs[1].chunks, [2..5, 6..8]);
}

#[test]
fn every_block_has_one_place_whatever_the_chunks() {
    for stages in 1..=28 {
        for virtual_stages in 1..=28 / stages {
            for head in [0.0, 1.328, 2.656, 40.0] {
                let specs = partition::by_cost(28, stages, virtual_stages, head).unwrap();
                let count = if stages == 1 { 1 } else { virtual_stages };
                let in_order: Vec<usize> = (0..count)
                    .flat_map(|chunk| specs.iter().flat_map(move |s| s.chunks[chunk].clone()))
                    .collect();
                assert!(in_order.into_iter().eq(0..28));
                assert!(chunks(&specs).iter().all(|chunks| chunks.len() == count));
                assert!(chunks(&specs).iter().flatten().all(|&len| len > 0));
            }
        }
    }
}

#[test]
fn too_many_chunks_are_refused_with_the_most_there_can_be() {
    let error = partition::by_cost(28, 4, 8, 1.0).unwrap_err();
    let many = PartitionError::TooManyVirtualStages {
        stages: 4,
        virtual_stages: 8,
        num_layers: 28,
    };
    assert_eq!(error, many);
    let text = error.to_string();
    assert!(
        text.contains("28 blocks: at most 7 virtual stages"),
        "{text}"
    );
    let text = partition::by_cost(28, 15, 2, 1.0).unwrap_err().to_string();
    assert!(text.contains("at most 1 virtual stage with 15"), "{text}");
    let text = partition::by_cost(28, 2, usize::MAX, 1.0)
        .unwrap_err()
        .to_string();
    assert!(text.contains("at most 14 virtual stages"), "{text}");
    // One stage has nothing to interleave, so any number will do.
    assert_eq!(
        partition::by_cost(28, 1, 99, 1.0),
        partition::by_cost(28, 1, 1, 1.0)
    );

    let error = partition::from_balance(&[10, 10, 2, 6], 28, 3).unwrap_err();
    let empty = PartitionError::EmptyChunk {
        balance: vec![10, 10, 2, 6],
        rank: 2,
        blocks: 2,
        virtual_stages: 3,
    };
    assert_eq!(error, empty);
    let text = error.to_string();
    assert!(
        text.contains("stage 2 cannot divide its 2 blocks"),
        "{text}"
    );
    assert!(text.contains("at most 2 virtual stages"), "{text}");
    let text = partition::from_balance(&[10, 10, 8], 28, 10)
        .unwrap_err()
        .to_string();
    assert!(text.contains("at most 9 virtual stages"), "{text}");
}
