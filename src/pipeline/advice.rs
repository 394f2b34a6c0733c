//! A run that does not fit: what is missing, and the nearest settings that would fit.

use std::collections::BTreeMap;

use super::base::{Layout, StartError};
use super::fit::{Demand, Shortage};
use super::needs::DeviceMemory;
use crate::config::byte_size::ByteSize;
use crate::config::model::ModelConfig;
use crate::config::run::{Device, Quantization, Recompute};
use crate::data::rows::Rows;
use crate::data::sampler::MicroBatchSize;
use crate::model::trainables::Trainables;

/// A device has not the memory that its stages need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoRoom {
    /// What is missing.
    pub shortage: Shortage,
    /// Changes of settings, each of which would do, the mildest first; where none of them does alone,
    /// several that do together.
    pub advice: Vec<String>,
}

impl std::error::Error for NoRoom {}

impl std::fmt::Display for NoRoom {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shortage {
            rank,
            device,
            sharing,
            needed,
            room,
            own,
            firm: _,
        } = self.shortage;
        match sharing {
            1 => write!(out, "stage {rank} on device {device} needs")?,
            _ => write!(out, "the {sharing} stages on device {device} need")?,
        }
        let missing = ByteSize(self.shortage.missing());
        let (needed, room) = (ByteSize(needed), ByteSize(room));
        write!(out, " {needed}, and {room} are there for it")?;
        if own > 0 {
            let own = ByteSize(own);
            write!(out, " beside about {own} of context and libraries")?;
        }
        write!(out, ": {missing} are missing; ")?;
        match &self.advice[..] {
            [] => write!(out, "no setting makes it fit: use a smaller model"),
            advice => write!(out, "what would fit: {}", advice.join("; or ")),
        }
    }
}

/// How long the rows are that micro-batches are made of.
#[derive(Clone, Debug)]
pub struct RowLengths {
    /// Number of rows of each length.
    counts: BTreeMap<usize, usize>,
    /// Of rows that stand alone: the longest that the loss is measured on.
    alone: usize,
}

impl RowLengths {
    /// Of rows to train on, and rows to measure the loss on.
    pub fn of(rows: &Rows, validation: Option<&Rows>) -> Self {
        let mut counts = BTreeMap::new();
        for length in rows.lengths() {
            *counts.entry(length).or_insert(0) += 1;
        }
        let alone = validation.into_iter().flat_map(Rows::lengths).max();
        RowLengths {
            counts,
            alone: alone.unwrap_or(0),
        }
    }

    /// Any number of rows of the same length.
    pub fn uniform(length: usize) -> Self {
        RowLengths {
            counts: BTreeMap::from([(length, usize::MAX)]),
            alone: 0,
        }
    }

    /// Tokens of the longest row.
    pub fn longest(&self) -> usize {
        let trained = self.counts.keys().next_back().copied().unwrap_or(0);
        trained.max(self.alone)
    }

    /// Most tokens of a micro-batch when no row is longer than `longest`, as if the longest rows met.
    fn most_tokens(&self, size: MicroBatchSize, longest: usize) -> usize {
        let alone = self.longest().min(longest);
        match size {
            MicroBatchSize::Tokens(budget) => alone.max(budget),
            MicroBatchSize::Rows(rows) => {
                let mut left = rows;
                let mut tokens = 0;
                for (&length, &count) in self.counts.iter().rev() {
                    let taken = count.min(left);
                    tokens += taken * length.min(longest);
                    left -= taken;
                }
                alone.max(tokens)
            }
        }
    }
}

/// What a run asks for and what there is, with what its settings may become where it does not fit.
pub struct Wish<'a> {
    /// What it asks for.
    pub demand: &'a Demand,
    /// The model.
    pub model: &'a ModelConfig,
    /// What is trained.
    pub trainables: &'a Trainables,
    /// What its devices have.
    pub memory: &'a [DeviceMemory],
    /// Where micro-batches end.
    pub size: MicroBatchSize,
    /// Its rows.
    pub lengths: &'a RowLengths,
}

/// Settings that may change, and what to call the change.
#[derive(Clone)]
struct Change {
    demand: Demand,
    quantization: Quantization,
    size: MicroBatchSize,
    longest: usize,
    words: Vec<String>,
}

impl Wish<'_> {
    /// Who does what; and what is missing, with settings that would fit, where the devices have not the
    /// memory for it.
    ///
    /// # Errors
    /// As [`Demand::fit`].
    pub fn settle(&self) -> Result<(Layout, Option<Box<NoRoom>>), StartError> {
        let fitted = self
            .demand
            .fit_or_nearly(self.model, self.trainables, self.memory)?;
        let shortage = fitted.shortage.filter(|shortage| shortage.firm);
        Ok((
            fitted.layout,
            shortage.map(|shortage| self.refuse(shortage)),
        ))
    }

    /// What is missing, with settings that would fit.
    pub fn refuse(&self, shortage: Shortage) -> Box<NoRoom> {
        let mut advice: Vec<String> = self
            .changes(&self.as_it_is())
            .filter(|change| self.fits(change))
            .map(|change| change.words.join(" and "))
            .collect();
        if advice.is_empty() {
            advice.extend(self.together());
        }
        Box::new(NoRoom { shortage, advice })
    }

    fn as_it_is(&self) -> Change {
        Change {
            demand: self.demand.clone(),
            quantization: self.model.quantization,
            size: self.size,
            longest: self.lengths.longest(),
            words: Vec::new(),
        }
    }

    /// Whether a run with these settings fits, by the arithmetic that refused it.
    fn fits(&self, change: &Change) -> bool {
        let model = ModelConfig {
            quantization: change.quantization,
            ..self.model.clone()
        };
        let mut memory = self.memory.to_vec();
        for rank in self.demand.devices.len()..change.demand.devices.len() {
            let Some(last) = memory.last().cloned() else {
                return false;
            };
            memory.push(DeviceMemory {
                device: change.demand.devices[rank],
                stages: vec![rank],
                ..last
            });
        }
        let fitted = change.demand.fit(&model, self.trainables, &memory);
        fitted.is_ok_and(|fitted| fitted.shortage.is_none())
    }

    /// Each single change of `from`, the mildest first; where a setting has many values, the nearest that
    /// fits, or the furthest.
    fn changes<'s>(&'s self, from: &'s Change) -> impl Iterator<Item = Change> + 's {
        let kinds = [
            Wish::any_balance,
            Wish::smaller_batches,
            Wish::shorter_rows,
            Wish::recompute_all,
            Wish::int8,
            Wish::int4,
            Wish::more_devices,
        ];
        kinds.into_iter().filter_map(move |kind| kind(self, from))
    }

    /// The mildest changes that fit together, one kind after another.
    fn together(&self) -> Option<String> {
        let kinds = [
            Wish::any_balance,
            Wish::recompute_all,
            Wish::smaller_batches,
            Wish::int8,
            Wish::int4,
            Wish::more_devices,
            Wish::shorter_rows,
        ];
        let mut change = self.as_it_is();
        for kind in kinds {
            let Some(next) = kind(self, &change) else {
                continue;
            };
            change = next;
            if self.fits(&change) {
                return Some(change.words.join(" and "));
            }
        }
        None
    }

    fn any_balance(&self, from: &Change) -> Option<Change> {
        from.demand.balance.as_ref()?;
        let mut change = from.clone();
        change.demand.balance = None;
        change.words.push("no balance".to_owned());
        Some(change)
    }

    fn with_batches(&self, from: &Change, size: MicroBatchSize, longest: usize) -> Change {
        let mut change = from.clone();
        (change.size, change.longest) = (size, longest);
        change.demand.max_rows = self.lengths.most_tokens(size, longest);
        if let MicroBatchSize::Rows(rows) = size {
            change.demand.max_sequences = rows.min(self.demand.max_sequences);
        }
        change
    }

    fn smaller_batches(&self, from: &Change) -> Option<Change> {
        let (most, least, name) = match from.size {
            MicroBatchSize::Rows(rows) => (rows, 1, "micro_batch_size"),
            MicroBatchSize::Tokens(tokens) => {
                (tokens, self.lengths.longest(), "micro_batch_tokens")
            }
        };
        let with = |count: usize| {
            let size = match from.size {
                MicroBatchSize::Rows(_) => MicroBatchSize::Rows(count),
                MicroBatchSize::Tokens(_) => MicroBatchSize::Tokens(count),
            };
            let mut change = self.with_batches(from, size, from.longest);
            change.words.push(format!("{name} = {count}"));
            change
        };
        let count = self.largest(least, most, &with)?;
        Some(with(count))
    }

    fn shorter_rows(&self, from: &Change) -> Option<Change> {
        /// Shorter ones are of no use.
        const LEAST: usize = 64;
        let with = |longest: usize| {
            let mut change = self.with_batches(from, from.size, longest);
            let words = format!(
                "rows of at most {longest} tokens (max_source_length and max_target_length)"
            );
            change.words.push(words);
            change
        };
        let longest = self.largest(LEAST, from.longest, &with)?;
        Some(with(longest))
    }

    /// The largest value from `least` to below `most` that fits, or `least`; nothing when there is none.
    fn largest(&self, least: usize, most: usize, with: &dyn Fn(usize) -> Change) -> Option<usize> {
        if least >= most {
            return None;
        }
        let (mut fitting, mut beyond) = (least, most);
        while fitting + 1 < beyond {
            let middle = fitting.midpoint(beyond);
            match self.fits(&with(middle)) {
                true => fitting = middle,
                false => beyond = middle,
            }
        }
        Some(fitting)
    }

    fn recompute_all(&self, from: &Change) -> Option<Change> {
        if matches!(from.demand.recompute, Recompute::Auto | Recompute::Block) {
            return None;
        }
        let mut change = from.clone();
        change.demand.recompute = Recompute::Auto;
        change.words.push("recompute = \"auto\"".to_owned());
        Some(change)
    }

    fn quantised(&self, from: &Change, to: Quantization, word: &str) -> Option<Change> {
        if self.trainables.is_full() || self.model.quantization != Quantization::None {
            return None;
        }
        let mut change = from.clone();
        change.quantization = to;
        change
            .words
            .retain(|words| !words.starts_with("quantization"));
        change.words.push(format!("quantization = \"{word}\""));
        Some(change)
    }

    fn int8(&self, from: &Change) -> Option<Change> {
        self.quantised(from, Quantization::Int8, "int8")
    }

    fn int4(&self, from: &Change) -> Option<Change> {
        self.quantised(from, Quantization::Int4, "int4")
    }

    /// The fewest devices like the last that are enough; those of GPUs, as the CPU's memory is one.
    fn more_devices(&self, from: &Change) -> Option<Change> {
        let devices = &from.demand.devices;
        let distinct = self.memory.len() == devices.len();
        let ordinals = devices.iter().filter_map(|device| device.ordinal());
        let highest = ordinals.max().filter(|_| distinct)?;
        let with = |count: usize| {
            let mut change = from.clone();
            change.demand.balance = None;
            for added in 1..=(count - devices.len()) as u32 {
                change.demand.devices.push(Device::Cuda(highest + added));
            }
            change.words.push(format!("{count} devices like these"));
            change
        };
        let counts = devices.len() + 1..=self.model.num_layers;
        counts.map(with).find(|change| self.fits(change))
    }
}
