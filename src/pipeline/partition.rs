//! Which stage holds which blocks: by cost, because the head is worth several blocks.

use std::ops::Range;

use crate::config::model::ModelConfig;
use crate::config::run::Recompute;
use crate::model::names::LinearSite;

/// What one stage holds of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageSpec {
    /// Index of the stage, 0 first.
    pub rank: usize,
    /// Number of stages.
    pub stages: usize,
    /// The blocks of each of its chunks, by index in the model, ascending; none is empty. One chunk,
    /// but for the interleaved schedule.
    pub chunks: Vec<Range<usize>>,
    /// Whether it holds the embedding (the first stage, in front of its first chunk).
    pub embedding: bool,
    /// Whether it holds the final norm, lm_head and the loss (the last stage, behind its last chunk).
    pub head: bool,
}

impl StageSpec {
    /// Its blocks, by index in the model, ascending.
    pub fn blocks(&self) -> impl Iterator<Item = usize> + '_ {
        self.chunks.iter().cloned().flatten()
    }

    /// How many blocks it holds.
    pub fn num_blocks(&self) -> usize {
        self.chunks.iter().map(Range::len).sum()
    }

    /// Work of the stage in blocks, with the head worth `head_cost` blocks.
    pub fn cost(&self, head_cost: f64) -> f64 {
        self.num_blocks() as f64 + if self.head { head_cost } else { 0.0 }
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
    /// A chunk would have no block.
    #[error(
        "{stages} stages of {virtual_stages} virtual stages each for {num_layers} blocks: at most \
         {} with {stages} stages (pipeline.virtual_stages)",
        virtual_stages_of(num_layers / (*stages).max(1))
    )]
    TooManyVirtualStages {
        /// Stages asked for.
        stages: usize,
        /// Chunks per stage asked for.
        virtual_stages: usize,
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
    /// A stage of the balance whose blocks do not go round its chunks.
    #[error(
        "balance {balance:?}: stage {rank} cannot divide its {blocks} blocks into {virtual_stages} virtual \
         stages; give it at least {virtual_stages}, or ask for at most {} (pipeline.virtual_stages)",
        virtual_stages_of(*blocks)
    )]
    EmptyChunk {
        /// The balance as given.
        balance: Vec<usize>,
        /// The stage with the fewest blocks.
        rank: usize,
        /// How many it has.
        blocks: usize,
        /// Chunks per stage asked for.
        virtual_stages: usize,
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

fn virtual_stages_of(count: usize) -> String {
    match count {
        1 => "1 virtual stage".to_owned(),
        _ => format!("{count} virtual stages"),
    }
}

/// What lm_head and the loss cost beside one block, in matrix work per step.
///
/// Forward, the head is `2 V H` operations for the `target_share` of the rows that have a target
/// (0 to 1), a block two for every row and weight of its linear layers (in ChatGLM-6B `4 H^2 + 2 H F`). Backward adds the same again for the input gradients, and once
/// more for weight gradients when the base is trained; recomputation adds to the blocks only.
/// `Recompute::Auto` counts as none, because it is chosen after the partition.
pub fn head_cost(
    model: &ModelConfig,
    target_share: f64,
    recompute: Recompute,
    base_is_trained: bool,
) -> f64 {
    let (v, h) = (model.vocab_size as f64, model.hidden_size as f64);
    let block = LinearSite::weights(model, |_| true);
    let passes = if base_is_trained { 3.0 } else { 2.0 };
    let recomputed = match recompute {
        Recompute::None | Recompute::Auto => 0.0,
        Recompute::AttentionFree => LinearSite::weights(model, |site| site == LinearSite::HTo4h),
        Recompute::Block => block,
    };
    passes * v * h * target_share / (passes * block + recomputed)
}

/// Deals `num_layers` equal blocks to `stages` stages of `virtual_stages` chunks each so that the
/// costliest stage costs least, with lm_head worth `head_cost` blocks and the embedding nothing. Among
/// equals the most even split (least sum of squares), with the larger stages first; a stage divides its
/// blocks over its chunks by the same rule. A single stage has a single chunk, as its schedule has.
///
/// # Errors
/// When there is no stage or a chunk would have no block.
pub fn by_cost(
    num_layers: usize,
    stages: usize,
    virtual_stages: usize,
    head_cost: f64,
) -> Result<Vec<StageSpec>, PartitionError> {
    let chunks = check_count(stages, virtual_stages, num_layers)?;
    let most = vec![num_layers; stages];
    let sizes = deal(num_layers, chunks, &most, head_cost).unwrap_or_default();
    Ok(specs(&sizes, chunks, head_cost))
}

/// As [`by_cost`], among the splits in which every stage fits its device; `None` when there is none.
///
/// `fits(rank, chunks)` says whether stage `rank` fits with these blocks. It may depend on how many
/// there are in each chunk, not on which, and when it says no it must say no to more blocks too.
///
/// # Errors
/// When there is no stage or a chunk would have no block.
pub fn by_cost_and_fit(
    num_layers: usize,
    stages: usize,
    virtual_stages: usize,
    head_cost: f64,
    fits: &dyn Fn(usize, &[Range<usize>]) -> bool,
) -> Result<Option<Vec<StageSpec>>, PartitionError> {
    let chunks = check_count(stages, virtual_stages, num_layers)?;
    let most_alone = num_layers - (stages - 1) * chunks;
    let fewest = if stages == 1 { num_layers } else { chunks };
    let mut most = Vec::with_capacity(stages);
    for rank in 0..stages {
        let fits_with = |blocks: usize| {
            // The others share what is left, however it comes: only this stage is looked at.
            let others = vec![num_layers; stages - 1];
            let rest = deal(num_layers - blocks, chunks, &others, 0.0);
            let mut sizes = rest.unwrap_or_default();
            sizes.insert(rank.min(sizes.len()), blocks);
            fits(rank, &specs(&sizes, chunks, head_cost)[rank].chunks)
        };
        // The last number of blocks that fits, between the fewest it may have and the most.
        let (mut fitting, mut beyond) = (fewest - 1, most_alone + 1);
        while fitting + 1 < beyond {
            let middle = (fitting + beyond) / 2;
            match fits_with(middle) {
                true => fitting = middle,
                false => beyond = middle,
            }
        }
        most.push(fitting);
    }
    let sizes = deal(num_layers, chunks, &most, head_cost);
    Ok(sizes.map(|sizes| specs(&sizes, chunks, head_cost)))
}

/// Deals out the blocks as the user said (`--balance 10,10,8`: one number per stage); each stage divides
/// its own evenly over its `virtual_stages` chunks, the larger ones first. A single stage has a single
/// chunk.
///
/// # Errors
/// When there is no stage, a stage or a chunk would have no block, or the sum is not the model's number
/// of blocks.
pub fn from_balance(
    balance: &[usize],
    num_layers: usize,
    virtual_stages: usize,
) -> Result<Vec<StageSpec>, PartitionError> {
    check_count(balance.len(), 1, num_layers)?;
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
    let chunks = check_count(balance.len(), virtual_stages, num_layers)?;
    let fewest = (0..balance.len()).min_by_key(|&rank| balance[rank]);
    if let Some(rank) = fewest.filter(|&rank| balance[rank] < chunks) {
        return Err(PartitionError::EmptyChunk {
            balance: balance.to_vec(),
            rank,
            blocks: balance[rank],
            virtual_stages,
        });
    }
    Ok(specs(balance, chunks, 0.0))
}

/// Chunks per stage, if that many stages and chunks can be made.
fn check_count(
    stages: usize,
    virtual_stages: usize,
    num_layers: usize,
) -> Result<usize, PartitionError> {
    if stages == 0 {
        return Err(PartitionError::NoStages);
    }
    if stages > num_layers {
        return Err(PartitionError::TooManyStages { stages, num_layers });
    }
    if stages == 1 {
        return Ok(1);
    }
    if virtual_stages > num_layers / stages {
        return Err(PartitionError::TooManyVirtualStages {
            stages,
            virtual_stages,
            num_layers,
        });
    }
    Ok(virtual_stages.max(1))
}

/// Deals `total` blocks to as many parts as `most` has entries: each gets at least `least` and at most
/// what `most` says, and the last costs `head_cost` beside its blocks. `None` when they do not go round.
///
/// Every part costs its blocks and a constant, so that giving each block to the part that is cheapest so
/// far makes both the greatest cost and the sum of squares as small as they can be.
fn deal(total: usize, least: usize, most: &[usize], head_cost: f64) -> Option<Vec<usize>> {
    let parts = most.len();
    let mut sizes = vec![least; parts];
    if most.iter().any(|&most| most < least) {
        return None;
    }
    let cost =
        |part: usize, size: usize| size as f64 + if part + 1 == parts { head_cost } else { 0.0 };
    for _ in (least * parts)..total {
        let open = (0..parts).filter(|&part| sizes[part] < most[part]);
        let cheapest = open.min_by(|&a, &b| cost(a, sizes[a]).total_cmp(&cost(b, sizes[b])))?;
        sizes[cheapest] += 1;
    }
    Some(sizes)
}

/// The stages of these sizes, each cut into `chunks` chunks. Chunk `c` of stage `r` comes behind the
/// chunks `c` of the stages before it and all chunks before `c`.
fn specs(sizes: &[usize], chunks: usize, head_cost: f64) -> Vec<StageSpec> {
    let stages = sizes.len();
    let cut = |(rank, &size): (usize, &usize)| {
        let head_cost = if rank + 1 == stages { head_cost } else { 0.0 };
        deal(size, 1, &vec![size; chunks], head_cost).unwrap_or_default()
    };
    let sizes: Vec<Vec<usize>> = sizes.iter().enumerate().map(cut).collect();
    let mut specs: Vec<StageSpec> = (0..stages)
        .map(|rank| StageSpec {
            rank,
            stages,
            chunks: Vec::with_capacity(chunks),
            embedding: rank == 0,
            head: rank + 1 == stages,
        })
        .collect();
    let mut start = 0;
    for chunk in 0..chunks {
        for (spec, sizes) in specs.iter_mut().zip(&sizes) {
            let end = start + sizes.get(chunk).copied().unwrap_or(0);
            spec.chunks.push(start..end);
            start = end;
        }
    }
    specs
}
