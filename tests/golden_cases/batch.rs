//! From padded inputs to the engine's flat tokens, and from flat results back to padded tensors.

use std::ops::Range;

use mp_train::backend::Span;
use mp_train::data::batch::MicroBatch;
use mp_train::data::positions::{Positions, settle};
use mp_train::data::rows::{NO_LABEL, Row};

use super::Outcome;
use super::case::{Case, Family};
use super::compare::Found;
use super::manifest::Form;

/// What happens to padding on the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// Fed as ordinary tokens, with the same position rule.
    Fed,
    /// Cut off behind the last real token, or where a case does not tell it from padding, the last label.
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
    /// Which tokens are real; what the reference has for others means nothing.
    pub real: Vec<bool>,
}

/// A padded batch as it is stored.
pub struct Stored {
    rows: usize,
    seq: usize,
    ids: Vec<u32>,
    labels: Vec<u32>,
    /// Which tokens are real, `[rows, seq]`, where the case says so.
    mask: Option<Vec<bool>>,
    /// Where the reference put them, `[rows, seq]`, in a family with one position per token.
    positions: Option<Vec<i64>>,
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
            mask: None,
            positions: None,
        })
    }

    /// With a mask of ones and zeros, `[rows, seq]`.
    pub fn with_mask(self, mask: &[i64]) -> Outcome<Stored> {
        let known = mask.iter().all(|mark| [0, 1].contains(mark));
        if mask.len() != self.ids.len() || !known {
            return Err("the mask is not of ones and zeros, one for each id".into());
        }
        Ok(Stored {
            mask: Some(mask.iter().map(|&mark| mark == 1).collect()),
            ..self
        })
    }

    /// `input_ids` and `labels` of a case.
    pub fn of(case: &Case) -> Outcome<Stored> {
        Stored::under(case, "")
    }

    /// The same under a lead; with a mask and positions where they are one for each token.
    pub fn under(case: &Case, lead: &str) -> Outcome<Stored> {
        let name = |name: &str| format!("{lead}{name}");
        let (shape, ids) = case.input(&name("input_ids"))?;
        let labels = case.input_if_any(&name("labels"))?;
        let labels = labels.as_ref().map(|(_, labels)| &labels[..]);
        let mut stored = Stored::new(&shape, &ids, labels)?;
        if case.form == Form::Listed {
            if let Some((_, mask)) = case.input_if_any(&name("attention_mask"))? {
                stored = stored.with_mask(&mask)?;
            }
            let positions = case.input_if_any(&name("position_ids"))?;
            stored.positions = positions.map(|(_, positions)| positions);
        }
        Ok(stored)
    }

    fn is_real(&self, row: usize, column: usize) -> bool {
        let mask = self.mask.as_ref();
        mask.is_none_or(|mask| mask[row * self.seq + column])
    }

    /// The columns of the real tokens of a row.
    fn real(&self, row: usize) -> Outcome<Range<usize>> {
        let mut columns = (0..self.seq).filter(|&column| self.is_real(row, column));
        let first = columns.next().ok_or(format!("row {row} is all padding"))?;
        let end = columns.next_back().unwrap_or(first) + 1;
        match (first..end).all(|column| self.is_real(row, column)) {
            true => Ok(first..end),
            false => Err(format!("row {row} has padding inside").into()),
        }
    }

    fn row(&self, row: usize, columns: Range<usize>) -> (&[u32], &[u32]) {
        let cells = row * self.seq + columns.start..row * self.seq + columns.end;
        (&self.ids[cells.clone()], &self.labels[cells])
    }

    /// Rows padded on the right, positions and context by the model's rule.
    pub fn right_padded(&self, family: &Family, padding: Padding) -> Outcome<Batch> {
        let kept = |row: usize| -> Outcome<Range<usize>> {
            let real = self.real(row)?;
            match padding {
                _ if real.start != 0 => Err(format!("row {row} is padded on the left").into()),
                Padding::Fed => Ok(0..self.seq),
                Padding::Removed if real.end < self.seq => Ok(real),
                Padding::Removed => self.until_last_label(row),
            }
        };
        let kept = (0..self.rows).map(kept).collect::<Outcome<Vec<_>>>()?;
        self.by_rule(family, &kept)
    }

    /// Prompts padded on the left, without their padding.
    pub fn left_padded(&self, family: &Family, case: &Case) -> Outcome<Batch> {
        match case.form {
            Form::Named => self.masked(case, &self.non_pad(case)?),
            Form::Listed => {
                let kept = (0..self.rows).map(|row| self.real(row));
                self.by_rule(family, &kept.collect::<Outcome<Vec<_>>>()?)
            }
        }
    }

    /// Some columns of each row, with positions and context by the model's rule. It must be what the
    /// reference did, where that is stored.
    fn by_rule(&self, family: &Family, kept: &[Range<usize>]) -> Outcome<Batch> {
        let mut rows = Vec::new();
        let mut places = Vec::new();
        for (row, columns) in kept.iter().enumerate() {
            let (input_ids, labels) = self.row(row, columns.clone());
            let (context_length, positions) = settle(input_ids, None, None, &family.config)?;
            for (index, column) in columns.clone().enumerate() {
                let stored = self.positions.as_ref();
                let stored = stored.map(|positions| positions[row * self.seq + column]);
                let (ours, _) = positions.at(index);
                if stored.is_some_and(|stored| stored != i64::from(ours)) {
                    let why =
                        format!("row {row}, column {column}: position {ours}, not {stored:?}");
                    return Err(why.into());
                }
                places.push((row, column));
            }
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
    pub fn masked(&self, case: &Case, kept: &[Range<usize>]) -> Outcome<Batch> {
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
    fn non_pad(&self, case: &Case) -> Outcome<Vec<Range<usize>>> {
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

    /// The columns up to the last counted label of a row.
    fn until_last_label(&self, row: usize) -> Outcome<Range<usize>> {
        let (_, labels) = self.row(row, 0..self.seq);
        let last = labels.iter().rposition(|&label| label != NO_LABEL);
        Ok(0..last.ok_or(format!("row {row} has no label"))? + 1)
    }

    /// The same for each row.
    pub fn until_last_labels(&self) -> Outcome<Vec<Range<usize>>> {
        (0..self.rows)
            .map(|row| self.until_last_label(row))
            .collect()
    }

    fn batch(&self, rows: Vec<Row<'_>>, places: Vec<(usize, usize)>) -> Batch {
        let real = places
            .iter()
            .map(|&(row, column)| self.is_real(row, column));
        Batch {
            micro: MicroBatch::from_rows(rows),
            shape: [self.rows, self.seq],
            real: real.collect(),
            places,
        }
    }
}

impl Batch {
    /// `[T, width]` laid out as `[rows, seq, width]`.
    pub fn spread(&self, flat: &[f64], width: usize) -> Found {
        let [rows, seq] = self.shape;
        let mut values = vec![None; rows * seq * width];
        let places = self.places.iter().zip(flat.chunks_exact(width));
        for ((&(row, column), flat), _) in places.zip(&self.real).filter(|(_, real)| **real) {
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
