//! Which stage holds which blocks: by cost, because the head is worth several blocks.

use std::ops::Range;

use crate::config::model::ModelConfig;
use crate::config::run::Recompute;

/// What one stage holds of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageSpec {
    /// Index of the stage, 0 first.
    pub rank: usize,
    /// Number of stages.
    pub stages: usize,
    /// The runs of blocks it holds, by index in the model, ascending; none is empty. One, but for the
    /// interleaved schedule.
    pub chunks: Vec<Range<usize>>,
    /// Whether it holds the embedding (the first stage).
    pub embedding: bool,
    /// Whether it holds the final norm, lm_head and the loss (the last stage).
    pub head: bool,
}

impl StageSpec {
    /// Work of the stage in blocks, with the head worth `head_cost` blocks.
    pub fn cost(&self, head_cost: f64) -> f64 {
        self.chunks.iter().map(Range::len).sum::<usize>() as f64
            + if self.head { head_cost } else { 0.0 }
    }
}

/// Why blocks cannot be dealt out as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartitionError {
    /// No stage at all.
    #[error("no devices: name at least one, e.g. `--devices cpu`")]
    NoStages,
    /// A stage would have no block.
    #[error("{stages} stages for {num_layers} blocks: use at most {num_layers} devices")]
    TooManyStages {
        /// Stages asked for.
        stages: usize,
        /// Blocks of the model.
        num_layers: usize,
    },
    /// A stage without blocks in the balance.
    #[error("balance {balance:?}: stage {rank} has no block; every stage needs at least one")]
    EmptyStage {
        /// The balance as given.
        balance: Vec<usize>,
        /// The first stage without a block.
        rank: usize,
    },
    /// A balance for another model.
    #[error("balance {balance:?} deals out {sum} blocks, the model has {num_layers}")]
    WrongSum {
        /// The balance as given.
        balance: Vec<usize>,
        /// Its sum.
        sum: usize,
        /// Blocks of the model.
        num_layers: usize,
    },
}

/// What lm_head and the loss cost beside one block, in matrix work per step.
///
/// Forward, the head is `2 V H` operations for the `target_share` of the rows that have a target
/// (0 to 1), a block `2 (4 H^2 + 2 H F)` for every row: query_key_value 3 H^2, dense H^2, and H F
/// for each of the two MLP products. Backward adds the same again for the input gradients, and once
/// more for weight gradients when the base is trained; recomputation adds to the blocks only.
/// `Recompute::Auto` counts as none, because it is chosen after the partition.
pub fn head_cost(
    model: &ModelConfig,
    target_share: f64,
    recompute: Recompute,
    base_is_trained: bool,
) -> f64 {
    let (v, h, f) = (
        model.vocab_size as f64,
        model.hidden_size as f64,
        model.inner_hidden_size as f64,
    );
    let block = 4.0 * h * h + 2.0 * h * f;
    let passes = if base_is_trained { 3.0 } else { 2.0 };
    let recomputed = match recompute {
        Recompute::None | Recompute::Auto => 0.0,
        Recompute::AttentionFree => h * f,
        Recompute::Block => block,
    };
    passes * v * h * target_share / (passes * block + recomputed)
}

/// Deals `num_layers` equal blocks to `stages` stages so that the costliest stage costs least, with
/// lm_head worth `head_cost` blocks and the embedding nothing. Among equals the most even split
/// (least sum of squares), with the larger stages first.
pub fn by_cost(
    num_layers: usize,
    stages: usize,
    head_cost: f64,
) -> Result<Vec<StageSpec>, PartitionError> {
    check_count(stages, num_layers)?;
    if stages == 1 {
        return Ok(specs(&[num_layers]));
    }
    // Only the last stage differs from the others. So for each size of it the best that the others
    // can do is an even split, and trying all its sizes finds the optimum.
    let others = stages - 1;
    let mut best: Option<(f64, f64, Vec<usize>)> = None;
    for last in 1..=num_layers - others {
        let rest = num_layers - last;
        let (even, larger) = (rest / others, rest % others);
        let mut sizes: Vec<usize> = (0..others)
            .map(|rank| even + usize::from(rank < larger))
            .collect();
        sizes.push(last);
        let last_cost = last as f64 + head_cost;
        let worst = last_cost.max(sizes[0] as f64);
        let squares = sizes[..others]
            .iter()
            .map(|&size| (size * size) as f64)
            .sum::<f64>()
            + last_cost * last_cost;
        let better = best.as_ref().is_none_or(|(least, evenest, _)| {
            worst < *least || (worst == *least && squares < *evenest)
        });
        if better {
            best = Some((worst, squares, sizes));
        }
    }
    let sizes = best.map(|(_, _, sizes)| sizes).unwrap_or_default();
    Ok(specs(&sizes))
}

/// Deals out the blocks as the user said (`--balance 10,10,8`).
///
/// # Errors
/// When there is no stage, more stages than blocks, a stage without a block, or the sum is not the
/// model's number of blocks.
pub fn from_balance(
    balance: &[usize],
    num_layers: usize,
) -> Result<Vec<StageSpec>, PartitionError> {
    check_count(balance.len(), num_layers)?;
    if let Some(rank) = balance.iter().position(|&blocks| blocks == 0) {
        return Err(PartitionError::EmptyStage {
            balance: balance.to_vec(),
            rank,
        });
    }
    let sum = balance
        .iter()
        .fold(0_usize, |sum, &blocks| sum.saturating_add(blocks));
    if sum != num_layers {
        return Err(PartitionError::WrongSum {
            balance: balance.to_vec(),
            sum,
            num_layers,
        });
    }
    Ok(specs(balance))
}

fn check_count(stages: usize, num_layers: usize) -> Result<(), PartitionError> {
    if stages == 0 {
        return Err(PartitionError::NoStages);
    }
    if stages > num_layers {
        return Err(PartitionError::TooManyStages { stages, num_layers });
    }
    Ok(())
}

fn specs(sizes: &[usize]) -> Vec<StageSpec> {
    let stages = sizes.len();
    let mut start = 0;
    sizes
        .iter()
        .enumerate()
        .map(|(rank, size)| {
            let blocks = start..start + size;
            start = blocks.end;
            StageSpec {
                rank,
                stages,
                chunks: vec![blocks],
                embedding: rank == 0,
                head: rank + 1 == stages,
            }
        })
        .collect()
}
