//! From what a run asks for and what its devices have to who does what: blocks dealt out by cost and by
//! fit together, and the cheapest recomputation that fits.

use std::ops::Range;
use std::time::Duration;

use super::base::{Layout, StartError};
use super::cost::{TypicalBatch, chunk_cost};
use super::needs::DeviceMemory;
use super::partition::{self, PartitionError, StageSpec};
use super::schedule::Schedule;
use crate::config::model::ModelConfig;
use crate::config::run::{
    Device, Precision, ProductSums, Recompute, RotaryPrecision, ScheduleKind, TransportKind,
};
use crate::model::trainables::Trainables;

/// What a run asks for, before it is known who does what.
#[derive(Clone, Debug)]
pub struct Demand {
    /// One stage per entry.
    pub devices: Vec<Device>,
    /// How stages exchange activations.
    pub transport: TransportKind,
    /// Blocks per stage; by cost and fit when absent.
    pub balance: Option<Vec<usize>>,
    /// Storage type.
    pub precision: Precision,
    /// Rounding of the rotary tables.
    pub rotary_table: RotaryPrecision,
    /// What products of the frozen linear layers are summed in.
    pub product_sums: ProductSums,
    /// Order of forwards and backwards.
    pub schedule: ScheduleKind,
    /// Chunks of each stage.
    pub virtual_stages: usize,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// What is recomputed.
    pub recompute: Recompute,
    /// CPU threads for all stages together.
    pub threads: usize,
    /// Silence of a stage after which it counts as hung.
    pub stall_timeout: Duration,
    /// T of the largest micro-batch.
    pub max_rows: usize,
    /// S of the largest micro-batch.
    pub max_sequences: usize,
    /// A typical micro-batch, which costs are counted for.
    pub typical: TypicalBatch,
}

/// A stage without the memory that it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// The stage.
    pub rank: usize,
    /// Its device.
    pub device: Device,
    /// Stages on the same device, itself included.
    pub sharing: usize,
    /// Bytes that they need, with all the recomputation that may be chosen.
    pub needed: u64,
    /// Bytes that there are for them, without what context and libraries take.
    pub room: u64,
    /// Bytes that context and libraries take.
    pub own: u64,
    /// Whether more cannot be had ([`DeviceMemory::firm`]).
    pub firm: bool,
}

impl Shortage {
    /// Bytes that are missing.
    pub fn missing(&self) -> u64 {
        self.needed.saturating_sub(self.room)
    }
}

/// Where blocks went, and whether they fit there.
#[derive(Clone, Debug)]
pub struct Fitted {
    /// Who does what.
    pub layout: Layout,
    /// The stage that needs most beyond what it has, where one does.
    pub shortage: Option<Shortage>,
}

/// Recomputation from cheap in time to cheap in memory.
const LEVELS: [Recompute; 3] = [Recompute::None, Recompute::AttentionFree, Recompute::Block];

/// What a search for a layout looks at.
struct Search<'a> {
    demand: &'a Demand,
    model: &'a ModelConfig,
    trainables: &'a Trainables,
    memory: &'a [DeviceMemory],
    schedule: Schedule,
}

impl Demand {
    /// Deals out the blocks and chooses what is recomputed, for devices with this memory: of the splits by
    /// cost and by fit the one whose costliest stage costs least. Where nothing fits, the split by cost
    /// with the most recomputation, and what is missing.
    ///
    /// # Errors
    /// The blocks cannot be dealt out so, or there is no such schedule.
    pub fn fit(
        &self,
        model: &ModelConfig,
        trainables: &Trainables,
        memory: &[DeviceMemory],
    ) -> Result<Fitted, StartError> {
        let search = self.search(model, trainables, memory)?;
        let mut best: Option<(f64, Fitted)> = None;
        for split in search.splits()? {
            let fitted = search.recomputing(split);
            let cost = match fitted.shortage {
                None => search.bottleneck(&fitted.layout),
                Some(_) => f64::INFINITY,
            };
            if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                best = Some((cost, fitted));
            }
        }
        let none = StartError::Partition(PartitionError::NoStages);
        best.map(|(_, fitted)| fitted).ok_or(none)
    }

    /// As [`Demand::fit`]; where nothing fits, the split whose worst stage misses least. Takes longer
    /// then.
    ///
    /// # Errors
    /// As [`Demand::fit`].
    pub fn fit_or_nearly(
        &self,
        model: &ModelConfig,
        trainables: &Trainables,
        memory: &[DeviceMemory],
    ) -> Result<Fitted, StartError> {
        let fitted = self.fit(model, trainables, memory)?;
        let Some(shortage) = &fitted.shortage else {
            return Ok(fitted);
        };
        let search = self.search(model, trainables, memory)?;
        let Some(split) = search.closest()? else {
            return Ok(fitted);
        };
        let nearest = search.recomputing(split);
        match &nearest.shortage {
            Some(nearer) if nearer.missing() >= shortage.missing() => Ok(fitted),
            _ => Ok(nearest),
        }
    }

    fn search<'a>(
        &'a self,
        model: &'a ModelConfig,
        trainables: &'a Trainables,
        memory: &'a [DeviceMemory],
    ) -> Result<Search<'a>, StartError> {
        let (stages, chunks) = (self.devices.len(), self.virtual_stages);
        Ok(Search {
            schedule: Schedule::build(self.schedule, stages, chunks, self.micro_batches)?,
            demand: self,
            model,
            trainables,
            memory,
        })
    }

    /// The levels of recomputation to choose from.
    fn levels(&self) -> &[Recompute] {
        match self.recompute {
            Recompute::Auto => &LEVELS,
            Recompute::None => &LEVELS[..1],
            Recompute::AttentionFree => &LEVELS[1..2],
            Recompute::Block => &LEVELS[2..],
        }
    }
}

impl Search<'_> {
    /// The splits worth looking at: the user's; or by cost alone, and by cost among those that fit, for
    /// each level of recomputation.
    fn splits(&self) -> Result<Vec<Vec<StageSpec>>, StartError> {
        let Demand {
            devices,
            balance,
            virtual_stages,
            ..
        } = self.demand;
        let layers = self.model.num_layers;
        if let Some(balance) = balance {
            let split = partition::from_balance(balance, layers, *virtual_stages)?;
            return Ok(vec![split]);
        }
        let mut splits: Vec<Vec<StageSpec>> = Vec::new();
        for &level in self.demand.levels() {
            let head_cost = self.head_cost(level);
            let by_cost = partition::by_cost(layers, devices.len(), *virtual_stages, head_cost)?;
            for split in std::iter::once(by_cost).chain(self.by_fit(level, 0)?) {
                if !splits.contains(&split) {
                    splits.push(split);
                }
            }
        }
        Ok(splits)
    }

    /// What the head costs in blocks.
    fn head_cost(&self, level: Recompute) -> f64 {
        let (share, full) = (self.demand.typical.target_share, self.trainables.is_full());
        partition::head_cost(self.model, share, level, full)
    }

    /// The split by cost among those that fit with this recomputation, if every stage had `more` bytes.
    fn by_fit(&self, level: Recompute, more: u64) -> Result<Option<Vec<StageSpec>>, StartError> {
        let (layers, stages) = (self.model.num_layers, self.demand.devices.len());
        let (chunks, head_cost) = (self.demand.virtual_stages, self.head_cost(level));
        let any = partition::by_cost(layers, stages, chunks, head_cost)?;
        let fits = |rank: usize, chunks: &[Range<usize>]| {
            let mut split = any.clone();
            split[rank].chunks = chunks.to_vec();
            let layout = self.layout(split, vec![level; stages]);
            self.share(rank)
                .is_none_or(|share| self.needed(&layout, rank) <= share + more)
        };
        let split = partition::by_cost_and_fit(layers, stages, chunks, head_cost, &fits)?;
        Ok(split)
    }

    /// The split whose worst stage misses least, where nothing fits.
    fn closest(&self) -> Result<Option<Vec<StageSpec>>, StartError> {
        /// Nobody cares about less.
        const NEAR: u64 = 1 << 20;
        if self.demand.balance.is_some() {
            return Ok(None);
        }
        let level = self.demand.levels().last().copied();
        let level = level.unwrap_or(Recompute::Block);
        let (mut least, mut enough, mut found) = (0, NEAR, None);
        while found.is_none() && enough < 1 << 50 {
            found = self.by_fit(level, enough)?;
            if found.is_none() {
                (least, enough) = (enough, 2 * enough);
            }
        }
        while least + NEAR < enough {
            let middle = least.midpoint(enough);
            match self.by_fit(level, middle)? {
                Some(split) => (found, enough) = (Some(split), middle),
                None => least = middle,
            }
        }
        Ok(found)
    }

    fn layout(&self, stages: Vec<StageSpec>, recompute: Vec<Recompute>) -> Layout {
        let demand = self.demand;
        Layout {
            devices: demand.devices.clone(),
            precision: demand.precision,
            rotary_table: demand.rotary_table,
            product_sums: demand.product_sums,
            stages,
            schedule: self.schedule.clone(),
            recompute,
            max_rows: demand.max_rows,
            max_sequences: demand.max_sequences,
            transport: demand.transport,
            threads: demand.threads,
            stall_timeout: demand.stall_timeout,
        }
    }

    /// The memory of the device that stage `rank` is on.
    fn memory_of(&self, rank: usize) -> Option<&DeviceMemory> {
        let mut all = self.memory.iter();
        all.find(|memory| memory.stages.contains(&rank))
    }

    /// An equal share of its device for stage `rank`; nothing where there is no limit.
    fn share(&self, rank: usize) -> Option<u64> {
        let memory = self.memory_of(rank)?;
        Some(memory.room()? / memory.stages.len() as u64)
    }

    fn needed(&self, layout: &Layout, rank: usize) -> u64 {
        let capability = self.memory_of(rank).and_then(|memory| memory.capability);
        let bytes = layout.bytes(self.model, self.trainables, rank, capability);
        bytes.total()
    }

    /// The split with the cheapest recomputation that fits, alike for the stages of one device; the most
    /// where none does.
    fn recomputing(&self, split: Vec<StageSpec>) -> Fitted {
        let levels = self.demand.levels();
        let most = levels.last().copied().unwrap_or(Recompute::Block);
        let mut layout = self.layout(split, vec![most; self.demand.devices.len()]);
        let mut shortage: Option<Shortage> = None;
        for memory in self.memory {
            // Without a limit that is known, as little memory as can be.
            let Some(room) = memory.room() else { continue };
            let mut needed = 0;
            for &level in levels {
                for &rank in &memory.stages {
                    layout.recompute[rank] = level;
                }
                let stages = memory.stages.iter();
                needed = stages.map(|&rank| self.needed(&layout, rank)).sum();
                if needed <= room {
                    break;
                }
            }
            let missing = needed.saturating_sub(room);
            let most_missing = shortage.as_ref().map_or(0, Shortage::missing);
            if missing > most_missing {
                let stages = memory.stages.iter().copied();
                let largest = stages.max_by_key(|&rank| self.needed(&layout, rank));
                shortage = Some(Shortage {
                    rank: largest.unwrap_or_default(),
                    device: memory.device,
                    sharing: memory.stages.len(),
                    needed,
                    room,
                    own: memory.own,
                    firm: memory.firm,
                });
            }
        }
        Fitted { layout, shortage }
    }

    /// What the costliest stage costs, for one micro-batch.
    fn bottleneck(&self, layout: &Layout) -> f64 {
        let stages = 0..layout.stages.len();
        let costs = stages.map(|rank| {
            let chunks =
                layout.chunk_costs(self.model, self.trainables, &self.demand.typical, rank);
            chunks.into_iter().map(|cost| cost.total()).sum()
        });
        costs.fold(0.0, f64::max)
    }
}

impl Layout {
    /// What each chunk of stage `rank` costs for a micro-batch.
    pub fn chunk_costs(
        &self,
        model: &ModelConfig,
        trainables: &Trainables,
        batch: &TypicalBatch,
        rank: usize,
    ) -> Vec<super::cost::ChunkCost> {
        let (spec, sizes) = (&self.stages[rank], self.sizes(rank));
        let last = sizes.chunks.len().saturating_sub(1);
        let chunks = sizes.chunks.iter().enumerate();
        let cost = chunks.map(|(index, chunk)| {
            let head = spec.head && index == last;
            let (recompute, full) = (self.recompute[rank], trainables.is_full());
            chunk_cost(model, batch, chunk, head, recompute, full)
        });
        cost.collect()
    }
}
