//! The rotary tables, and the rotary step.

use half::bf16;
use mp_train::backend::{AttentionLayout, Element, HeadLayout, RotaryPositions};
use mp_train::config::architecture::{Architecture, RotaryKind};
use mp_train::model::rotary::{RotaryPrecision, RotaryTable, inverse_frequencies};

use super::case::{Case, Family};
use super::compare::{Found, FoundTensors, Report};
use super::{Golden, Outcome};

/// Positions that an input names.
fn positions(case: &Case, name: &str) -> Outcome<Vec<usize>> {
    let (_, positions) = case.input(name)?;
    let positions = positions.iter().map(|&position| usize::try_from(position));
    Ok(positions.collect::<Result<_, _>>()?)
}

/// ChatGLM-6B's. Every table that the case stores, by its name: `{sizes}.inv_freq`,
/// `{sizes}.{f32|f16}.{cos|sin}` at `positions`, `{case}.{cos|sin}` from position 0 on. Sizes and head_dim
/// are read off the widths.
pub fn two_dimensional(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let architecture = &family.config.architecture;
    let positions = positions(case, "positions")?;
    let names: Vec<String> = case.expected_names().map(str::to_owned).collect();
    let mut found = FoundTensors::new();
    for name in names {
        let shape = case.expected(&name)?.shape;
        let (sizes, table) = name.split_once('.').ok_or("a table without a name")?;
        let tensor = match (table, &shape[..]) {
            ("inv_freq", &[quarter]) => {
                let width = head_dim(family, sizes, 4 * quarter)? / 2;
                let frequencies = inverse_frequencies(architecture.rotary, width);
                Found::whole([quarter], &frequencies)
            }
            (_, &[rows, half]) => {
                let head_dim = head_dim(family, sizes, 2 * half)?;
                let (precision, function) = match table.split_once('.') {
                    Some(("f32", function)) => (RotaryPrecision::F32, function),
                    Some(("f16", function)) => (RotaryPrecision::Original, function),
                    _ => (RotaryPrecision::F32, table),
                };
                let places = match table.contains('.') {
                    true => positions.clone(),
                    false => (0..rows).collect(),
                };
                let last = places.iter().max().map_or(0, |last| last + 1);
                let tables = RotaryTable::new(architecture, head_dim, last, precision);
                let values = match function {
                    "cos" => tables.cos,
                    "sin" => tables.sin,
                    _ => return Err(format!("`{name}` is no table that is known").into()),
                };
                // The original repeats the frequencies along the row; the engine stores them once.
                let quarter = half / 2;
                let rows = places.iter().flat_map(|place| {
                    let row = &values[place * quarter..(place + 1) * quarter];
                    row.iter().chain(row).copied()
                });
                Found::whole([places.len(), half], &rows.collect::<Vec<_>>())
            }
            _ => return Err(format!("`{name}` has the shape {shape:?}").into()),
        };
        found.insert(name, tensor);
    }
    report.compare(case, "tables", &found)
}

/// The head_dim of a table, which is the model's own except in `real.*`.
fn head_dim(family: &Family, sizes: &str, head_dim: usize) -> Outcome<usize> {
    let own = family.config.head_dim;
    if sizes != "real" && head_dim != own {
        return Err(format!("`{sizes}` is for head_dim {head_dim}, the model has {own}").into());
    }
    Ok(head_dim)
}

/// A table of later generations: its angles and how it is rounded.
struct Table {
    base: f64,
    position_divisor: f64,
    rounding: Rounding,
}

enum Rounding {
    /// Not at all.
    F32,
    /// The finished table, as the engine has it in half precision.
    F16,
    /// The finished table, by the test: no backend stores bf16.
    Bf16,
}

impl Table {
    /// By its name; nothing for the tables that the engine means not to have.
    fn named(name: &str, ratio: Option<f64>) -> Outcome<Option<Table>> {
        let table = |base: f64, position_divisor: f64, rounding| {
            Ok(Some(Table {
                base,
                position_divisor,
                rounding,
            }))
        };
        let number = |lead: &str, end: &str| {
            let rest = name.strip_prefix(lead)?.strip_suffix(end)?;
            rest.parse::<f64>().ok()
        };
        let ratio = || ratio.ok_or("no `ratio_in_tiny_tables`");
        if let Some(ratio) = number("real.base_times_", "_float32") {
            return table(1e4 * ratio, 1.0, Rounding::F32);
        }
        if let Some(ratio) = number("real.position_over_", "_float32") {
            return table(1e4, ratio, Rounding::F32);
        }
        if let Some(theta) = number("real.theta_", "") {
            return table(theta, 1.0, Rounding::F32);
        }
        match name {
            "table" | "real.chatglm2_float32" => table(1e4, 1.0, Rounding::F32),
            "table_base_times_ratio" => table(1e4 * ratio()?, 1.0, Rounding::F32),
            "table_position_over_ratio" => table(1e4, ratio()?, Rounding::F32),
            "real.chatglm3_float16" => table(1e4, 1.0, Rounding::F16),
            "real.chatglm3_bfloat16" => table(1e4, 1.0, Rounding::Bf16),
            // ChatGLM2's own code in half precision, which loses its place beyond position 2,048 (256 in
            // bf16): `RotaryTable::new` says why it is not followed.
            "real.chatglm2_float16" | "real.chatglm2_bfloat16" => Ok(None),
            _ => Err(format!("`{name}` is no table that is known").into()),
        }
    }

    /// `[positions, width / 2, 2]`, cosine and sine.
    fn rows(&self, positions: &[usize], width: usize) -> Vec<f32> {
        let architecture = Architecture::chatglm2(RotaryKind::Interleaved {
            width,
            base: self.base,
            position_divisor: self.position_divisor,
        });
        let precision = match self.rounding {
            Rounding::F32 | Rounding::Bf16 => RotaryPrecision::F32,
            Rounding::F16 => RotaryPrecision::Original,
        };
        let rounded = |x: f32| match self.rounding {
            Rounding::F32 | Rounding::F16 => x,
            Rounding::Bf16 => bf16::from_f32(x).to_f32(),
        };
        let last = positions.iter().max().map_or(0, |last| last + 1);
        let RotaryTable { cos, sin } = RotaryTable::new(&architecture, 2 * width, last, precision);
        let half = width / 2;
        let entries = positions.iter().flat_map(|position| {
            let row = position * half..(position + 1) * half;
            cos[row.clone()].iter().zip(&sin[row])
        });
        let entries = entries.flat_map(|(cos, sin)| [rounded(*cos), rounded(*sin)]);
        entries.collect()
    }
}

/// ChatGLM2's and later ones: tables by name, frequencies, and the step on random vectors.
pub fn interleaved<B: Golden>(
    family: &Family,
    case: &Case,
    report: &mut Report<'_>,
) -> Outcome<()> {
    let kind = family.config.architecture.rotary;
    let RotaryKind::Interleaved { width, .. } = kind else {
        return Err("the model has no rotary embedding of neighbours".into());
    };
    let real = positions(case, "real.positions")?;
    let ratio = case.settings["ratio_in_tiny_tables"].as_f64();
    let names: Vec<String> = case.expected_names().map(str::to_owned).collect();
    let mut found = FoundTensors::new();
    for name in names.iter().filter(|name| *name != "apply.y") {
        let shape = case.expected(name)?.shape;
        let tensor = match (&name[..], &shape[..]) {
            ("theta" | "inv_freq", &[half]) => {
                Found::whole([half], &inverse_frequencies(kind, 2 * half))
            }
            (_, &[rows, half, 2]) => {
                let Some(table) = Table::named(name, ratio)? else {
                    report.note(&format!("{name} is not computed"));
                    continue;
                };
                let (positions, own) = match name.starts_with("real.") {
                    true => (real.clone(), 2 * half),
                    false => ((0..rows).collect(), width),
                };
                if 2 * half != own || positions.len() != rows {
                    return Err(format!("`{name}` has the shape {shape:?}").into());
                }
                Found::whole([rows, half, 2], &table.rows(&positions, 2 * half))
            }
            _ => return Err(format!("`{name}` has the shape {shape:?}").into()),
        };
        found.insert(name.clone(), tensor);
    }
    report.compare(case, "tables", &found)?;
    let applied = applied::<B>(family, case, width)?;
    report.compare(
        case,
        "apply",
        &FoundTensors::from([("apply.y".to_owned(), applied)]),
    )
}

/// `apply.x` by the backend's op. Its `[batch, head, position, D]` are so many query heads for each pair
/// of batch and position, in rows that lie head by head.
fn applied<B: Golden>(family: &Family, case: &Case, width: usize) -> Outcome<Found> {
    let x = case.input_values("apply.x")?;
    let [batches, heads, rows, dim] = x.shape[..] else {
        return Err(format!("apply.x of shape {:?}", x.shape).into());
    };
    let (values, positions) = (x.to_f32()?, positions(case, "apply.position_ids")?);
    let place = |offset| HeadLayout {
        row: dim,
        offset,
        stride: dim,
    };
    // One query head to a row, no key.
    let layout = AttentionLayout {
        heads: 1,
        kv_heads: 0,
        head_dim: dim,
        query: place(0),
        key: place(0),
        value: place(0),
    };
    // Every row has the position of its token.
    let position = (0..batches * heads * rows)
        .map(|row| positions[row / (heads * rows) * rows + row % rows] as u32);
    let position: Vec<u32> = position.collect();
    let last = positions.iter().max().map_or(0, |last| last + 1);
    let architecture = &family.config.architecture;
    let table = RotaryTable::new(architecture, dim, last, RotaryPrecision::F32);
    let backend = B::open(1)?;
    let stored: Vec<B::Element> = values.iter().map(|&x| Element::from_f32(x)).collect();
    let mut y = backend.upload(&stored)?;
    let (cos, sin) = (backend.upload(&table.cos)?, backend.upload(&table.sin)?);
    let on_device = backend.upload(&position)?;
    let positions = RotaryPositions::Interleaved {
        position: &on_device,
        width,
    };
    backend.rotary(
        &mut y,
        &cos,
        &sin,
        positions,
        &layout,
        position.len(),
        false,
    )?;
    let y = backend.read(&y, stored.len())?;
    let y: Vec<f32> = y.into_iter().map(Element::to_f32).collect();
    Ok(Found::whole(x.shape.clone(), &y))
}
