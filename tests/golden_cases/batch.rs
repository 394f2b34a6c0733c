//! From padded inputs to the engine's flat tokens, and from flat results back to padded tensors.

use mp_train::backend::Span;
use mp_train::data::batch::MicroBatch;
use mp_train::data::positions::{Positions, settle};
use mp_train::data::rows::{NO_LABEL, Row};

use super::Outcome;
use super::case::{Case, Family};
use super::compare::Found;

/// What happens to padding on the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// Fed as ordinary tokens, with the same position rule.
    Fed,
    /// Cut off behind the last eop.
    Removed,
}

impl Padding {
    pub const BOTH: [Padding; 2] = [Padding::Fed, Padding::Removed];

    /// For the report.
    pub fn name(self) -> &'static str {
        match self {
            Padding::Fed => "padded",
            Padding::Removed => "unpadded",
        }
    }
}

/// A micro-batch, and where its tokens stand in the padded tensors.
pub struct Batch {
    pub micro: MicroBatch,
    /// Rows and columns of the padded tensors.
    pub shape: [usize; 2],
    /// (row, column) of each token.
    pub places: Vec<(usize, usize)>,
}

/// A padded batch as it is stored.
pub struct Stored {
    rows: usize,
    seq: usize,
    ids: Vec<u32>,
    labels: Vec<u32>,
}

impl Stored {
    /// `[rows, seq]` ids, and labels of the same shape where there are some.
    pub fn new(shape: &[usize], ids: &[i64], labels: Option<&[i64]>) -> Outcome<Stored> {
        let [rows, seq] = *shape else {
            return Err(format!("ids of shape {shape:?}").into());
        };
        let none = vec![-100; rows * seq];
        let labels = labels.unwrap_or(&none).iter();
        let label = |&label: &i64| match label {
            -100 => Ok(NO_LABEL),
            label => u32::try_from(label),
        };
        Ok(Stored {
            rows,
            seq,
            ids: ids
                .iter()
                .map(|&id| u32::try_from(id))
                .collect::<Result<_, _>>()?,
            labels: labels.map(label).collect::<Result<_, _>>()?,
        })
    }

    /// `input_ids` and `labels` of a case.
    pub fn of(case: &Case) -> Outcome<Stored> {
        let (shape, ids) = case.input("input_ids")?;
        let labels = match case.has("labels") {
            true => Some(case.input("labels")?.1),
            false => None,
        };
        Stored::new(&shape, &ids, labels.as_deref())
    }

    fn row(&self, row: usize, columns: std::ops::Range<usize>) -> (&[u32], &[u32]) {
        let cells = row * self.seq + columns.start..row * self.seq + columns.end;
        (&self.ids[cells.clone()], &self.labels[cells])
    }

    /// Rows padded on the right, positions and context by the model's rule.
    pub fn right_padded(&self, family: &Family, padding: Padding) -> Outcome<Batch> {
        let mut rows = Vec::new();
        let mut places = Vec::new();
        for row in 0..self.rows {
            let (ids, _) = self.row(row, 0..self.seq);
            let eop = ids
                .iter()
                .rposition(|&id| id == family.config.eos_token_ids[0]);
            let kept = match (padding, eop) {
                (Padding::Fed, _) => self.seq,
                (Padding::Removed, Some(eop)) => eop + 1,
                (Padding::Removed, None) => return Err(format!("row {row} has no eop").into()),
            };
            let (input_ids, labels) = self.row(row, 0..kept);
            let (context_length, positions) = settle(input_ids, None, None, &family.config)?;
            places.extend((0..kept).map(|column| (row, column)));
            rows.push(Row {
                input_ids,
                labels,
                context_length,
                positions,
            });
        }
        Ok(self.batch(rows, places))
    }

    /// Rows whose mask and positions are passed in; `kept` says which columns are real.
    ///
    /// An engine without padding takes no mask: the context length is read off the first real query,
    /// and the mask that it gives must be the one passed in.
    pub fn masked(&self, case: &Case, kept: &[std::ops::Range<usize>]) -> Outcome<Batch> {
        let (shape, mask) = case.input("attention_mask")?;
        if shape != [self.rows, 1, self.seq, self.seq] {
            return Err(format!("attention_mask of shape {shape:?}").into());
        }
        let (shape, positions) = case.input("position_ids")?;
        if shape != [self.rows, 2, self.seq] {
            return Err(format!("position_ids of shape {shape:?}").into());
        }
        let positions: Vec<u32> = positions
            .iter()
            .map(|&position| u32::try_from(position))
            .collect::<Result<_, _>>()?;
        let mut rows = Vec::new();
        let mut places = Vec::new();
        for (row, columns) in kept.iter().enumerate() {
            let query = |column: usize| &mask[(row * self.seq + column) * self.seq..][..self.seq];
            let zeros = query(columns.start).iter().filter(|&&hidden| hidden == 0);
            let context_length = zeros.count();
            for t in columns.clone() {
                for (k, &hidden) in query(t).iter().enumerate() {
                    let visible = k <= t || k < columns.start + context_length;
                    if columns.contains(&k) && visible != (hidden == 0)
                        || k < columns.start && hidden == 0
                    {
                        return Err(
                            format!("row {row}: the mask at ({t}, {k}) fits no context").into()
                        );
                    }
                }
            }
            let (input_ids, labels) = self.row(row, columns.clone());
            let list = |list: usize| {
                let start = (row * 2 + list) * self.seq;
                &positions[start + columns.start..start + columns.end]
            };
            places.extend(columns.clone().map(|column| (row, column)));
            rows.push(Row {
                input_ids,
                labels,
                context_length,
                positions: Positions::Given {
                    context: list(0),
                    block: list(1),
                },
            });
        }
        Ok(self.batch(rows, places))
    }

    /// The columns that `non_pad` marks, for each row.
    pub fn non_pad(&self, case: &Case) -> Outcome<Vec<std::ops::Range<usize>>> {
        let (_, marks) = case.input("non_pad")?;
        let rows = marks.chunks(self.seq).enumerate();
        rows.map(|(row, marks)| {
            let start = marks.iter().position(|&mark| mark == 1).unwrap_or(self.seq);
            if marks[..start].contains(&1) || marks[start..].contains(&0) {
                return Err(format!("row {row} is not padded on the left alone").into());
            }
            Ok(start..self.seq)
        })
        .collect()
    }

    /// The columns up to the last counted label, for each row.
    pub fn until_last_label(&self) -> Vec<std::ops::Range<usize>> {
        let rows = (0..self.rows).map(|row| self.row(row, 0..self.seq).1);
        let last = |labels: &[u32]| labels.iter().rposition(|&label| label != NO_LABEL);
        rows.map(|labels| 0..last(labels).map_or(0, |last| last + 1))
            .collect()
    }

    fn batch(&self, rows: Vec<Row<'_>>, places: Vec<(usize, usize)>) -> Batch {
        Batch {
            micro: MicroBatch::from_rows(rows),
            shape: [self.rows, self.seq],
            places,
        }
    }
}

impl Batch {
    /// `[T, width]` laid out as `[rows, seq, width]`.
    pub fn spread(&self, flat: &[f64], width: usize) -> Found {
        let [rows, seq] = self.shape;
        let mut values = vec![None; rows * seq * width];
        for (&(row, column), flat) in self.places.iter().zip(flat.chunks_exact(width)) {
            let start = (row * seq + column) * width;
            for (value, &flat) in values[start..start + width].iter_mut().zip(flat) {
                *value = Some(flat);
            }
        }
        Found {
            shape: vec![rows, seq, width],
            values,
            recomputed: false,
        }
    }

    /// For each head a `[T, width]`, laid out as `[rows, heads, seq, width]`.
    pub fn spread_heads(&self, heads: &[Vec<f64>], width: usize) -> Found {
        let [rows, seq] = self.shape;
        let mut values = vec![None; rows * heads.len() * seq * width];
        for (head, flat) in heads.iter().enumerate() {
            let spread = self.spread(flat, width).values;
            for row in 0..rows {
                let (from, to) = (row * seq * width, (row * heads.len() + head) * seq * width);
                values[to..to + seq * width].copy_from_slice(&spread[from..from + seq * width]);
            }
        }
        Found {
            shape: vec![rows, heads.len(), seq, width],
            values,
            recomputed: false,
        }
    }

    /// The mask that the engine's visibility rule amounts to: `[rows, 1, seq, prefix + seq]`, 1 where
    /// a key is hidden. Known where query and key are tokens of the batch.
    pub fn attention_mask(&self, prefix_len: usize) -> Found {
        let [rows, seq] = self.shape;
        let width = prefix_len + seq;
        let mut values = vec![None; rows * seq * width];
        for sequence in &self.micro.sequences {
            for t in 0..sequence.len {
                let (row, column) = self.places[sequence.start + t];
                let line = &mut values[(row * seq + column) * width..][..width];
                line[..prefix_len].fill(Some(0.0));
                for k in 0..sequence.len {
                    let (_, key) = self.places[sequence.start + k];
                    let visible = k <= t || k < sequence.context_length;
                    line[prefix_len + key] = Some(if visible { 0.0 } else { 1.0 });
                }
            }
        }
        Found {
            shape: vec![rows, 1, seq, width],
            values,
            recomputed: true,
        }
    }

    /// Both position rows, `[rows, 2, seq]`.
    pub fn position_ids(&self) -> Found {
        let widened = |ids: &[u32]| ids.iter().map(|&id| f64::from(id)).collect();
        let lists = [&self.micro.position, &self.micro.block_position];
        let found = self.spread_heads(&lists.map(|list| widened(list)), 1);
        Found {
            shape: vec![self.shape[0], 2, self.shape[1]],
            ..found
        }
    }

    /// The loss of each target at the row that predicts it, `[rows, seq - 1]`; 0 at other rows.
    pub fn token_loss(&self, losses: &[f64]) -> Found {
        let mut flat = vec![0.0; self.micro.tokens()];
        for (target, &loss) in self.micro.targets.iter().zip(losses) {
            flat[target.row as usize] = loss;
        }
        let [rows, seq] = self.shape;
        let spread = self.spread(&flat, 1).values;
        let values = spread.chunks(seq).flat_map(|row| &row[..seq - 1]);
        Found {
            values: values.copied().collect(),
            shape: vec![rows, seq - 1],
            recomputed: false,
        }
    }
}

/// The sequences of a micro-batch over its own rows.
pub fn spans(micro: &MicroBatch) -> Vec<Span> {
    let sequences = micro.sequences.iter();
    sequences
        .map(|sequence| Span {
            q_start: sequence.start,
            q_len: sequence.len,
            kv_start: sequence.start,
            kv_len: sequence.len,
            context_length: sequence.context_length,
        })
        .collect()
}
