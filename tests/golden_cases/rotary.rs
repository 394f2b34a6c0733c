//! The rotary tables.

use mp_train::model::rotary::{RotaryPrecision, RotaryTable, inverse_frequencies};

use super::Outcome;
use super::case::{Case, Family};
use super::compare::{Found, FoundTensors, Report};

/// Every table that the case stores, by its name: `{sizes}.inv_freq`, `{sizes}.{f32|f16}.{cos|sin}` at
/// `positions`, `{case}.{cos|sin}` from position 0 on. Sizes and head_dim are read off the widths.
pub fn run(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let (_, positions) = case.input("positions")?;
    let positions: Vec<usize> = positions
        .iter()
        .map(|&position| usize::try_from(position))
        .collect::<Result<_, _>>()?;
    let names: Vec<String> = case.expected_names().map(str::to_owned).collect();
    let mut found = FoundTensors::new();
    for name in names {
        let shape = case.expected(&name)?.shape;
        let (sizes, table) = name.split_once('.').ok_or("a table without a name")?;
        let tensor = match (table, &shape[..]) {
            ("inv_freq", &[quarter]) => Found::whole(
                [quarter],
                &inverse_frequencies(
                    family.config.architecture.rotary,
                    head_dim(family, sizes, 4 * quarter)? / 2,
                ),
            ),
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
                let tables =
                    RotaryTable::new(&family.config.architecture, head_dim, last, precision);
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
