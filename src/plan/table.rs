//! What each device holds.

use std::fmt::Write as _;

use super::subject::Subject;
use super::{WIDTH, wrapped};
use crate::config::run::Recompute;

/// The word for it, as it is typed.
pub fn recompute(recompute: Recompute) -> &'static str {
    match recompute {
        Recompute::None => "none",
        Recompute::AttentionFree => "attention_free",
        Recompute::Block => "block",
        Recompute::Auto => "auto",
    }
}

/// A unit that leaves a few digits of every number: gigabytes, or megabytes where nothing has one.
fn unit(largest: u64) -> (&'static str, f64) {
    match largest {
        1_000_000_000.. => ("GB", 1e9),
        _ => ("MB", 1e6),
    }
}

/// One row per stage, and what the columns mean.
pub fn devices(subject: &Subject) -> String {
    let Subject {
        model,
        trainables,
        layout,
        memory,
        ..
    } = subject;
    let bytes_of = |rank: usize| {
        let device = memory.iter().find(|memory| memory.stages.contains(&rank));
        let capability = device.and_then(|device| device.capability);
        layout.bytes(model, trainables, rank, capability)
    };
    let all: Vec<_> = (0..layout.stages.len()).map(bytes_of).collect();
    let largest = all.iter().map(|bytes| bytes.total()).max().unwrap_or(0);
    let (name, unit) = unit(largest);
    let number = |bytes: u64| format!("{:.2}", bytes as f64 / unit);
    let mut text = format!(
        "{:<5} {:<6} {:<9} {:<14} {:>8} {:>8} {:>13} {:>7} {:>6} {:>7} {:>7}\n",
        "stage",
        "device",
        "blocks",
        "recompute",
        "weights",
        "trained",
        "slots",
        "room",
        "own",
        name,
        "free",
    );
    for (rank, bytes) in all.iter().enumerate() {
        let spec = &layout.stages[rank];
        let ends = [(spec.embedding, "E"), (spec.head, "H")];
        let ends: String = ends
            .iter()
            .filter(|(held, _)| *held)
            .map(|(_, end)| *end)
            .collect();
        let blocks = match &spec.chunks[..] {
            [run] => format!("{}..{} {ends}", run.start, run.end),
            runs => {
                let count: usize = runs.iter().map(|run| run.len()).sum();
                format!("{count} in {} {ends}", runs.len())
            }
        };
        let device = memory.iter().find(|memory| memory.stages.contains(&rank));
        // What the stages of a device share is shown with the first of them.
        let first = device.filter(|device| device.stages.first() == Some(&rank));
        let own = first.map_or(0, |device| device.own);
        let free = first.and_then(|device| {
            let taken = device
                .stages
                .iter()
                .map(|&rank| all[rank].total())
                .sum::<u64>()
                + own;
            Some((device.bytes? as f64 - taken as f64) / unit)
        });
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{rank:<5} {:<6} {:<9} {:<14} {:>8} {:>8} {:>13} {:>7} {:>6} {:>7} {:>7}",
            layout.devices[rank].to_string(),
            blocks.trim_end(),
            recompute(layout.recompute[rank]),
            number(bytes.weights),
            number(bytes.trainables),
            format!("{} x {}", number(bytes.slot()), bytes.slots),
            number(bytes.workspace),
            number(own),
            number(bytes.total() + own),
            match (first, free) {
                (None, _) if device.is_some() => "shared".to_owned(),
                (_, Some(free)) => format!("{free:.2}"),
                (_, None) => "?".to_owned(),
            },
        );
    }
    debug_assert!(text.lines().all(|line| line.len() <= WIDTH));
    let given = memory.iter().any(|memory| memory.own > 0);
    let own = match given {
        true => "own: context, libraries and NCCL's buffers, an estimate; ",
        false => "",
    };
    text + &wrapped(&format!(
        "weights: frozen base; trained: adapter or model with gradient, f32 copy and moments; slots: \
         activations of a micro-batch x those in flight; room: workspace; {own}free: left of the device"
    ))
}
