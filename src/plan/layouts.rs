//! How other numbers of stages, schedules and micro-batches would do.

use std::fmt::Write as _;

use super::subject::Subject;
use super::{PlanOptions, wrapped};
use crate::config::run::ScheduleKind;
use crate::pipeline::base::Layout;
use crate::pipeline::fit::{Demand, Fitted};
use crate::pipeline::needs::DeviceMemory;

/// A layout that could be chosen.
#[derive(Clone, Copy)]
struct Choice {
    stages: usize,
    kind: ScheduleKind,
    virtual_stages: usize,
}

/// What a step would take.
struct Forecast {
    bubble: f64,
    step_seconds: f64,
    tokens_per_second: f64,
}

/// Parts of the model per stage that are tried.
const VIRTUAL_STAGES: [usize; 3] = [2, 4, 7];

impl Choice {
    /// All that the devices and the blocks allow.
    fn all(devices: usize, blocks: usize) -> Vec<Self> {
        use ScheduleKind::{Gpipe, Interleaved, OneForwardOneBackward};
        let mut all = Vec::new();
        for stages in 1..=devices.min(blocks) {
            let choice = |kind, virtual_stages| Choice {
                stages,
                kind,
                virtual_stages,
            };
            all.push(choice(OneForwardOneBackward, 1));
            if stages == 1 {
                // With one stage all schedules are one.
                continue;
            }
            all.push(choice(Gpipe, 1));
            let parts = VIRTUAL_STAGES.into_iter();
            let parts = parts.filter(|parts| stages * parts <= blocks);
            all.extend(parts.map(|parts| choice(Interleaved, parts)));
        }
        all
    }

    fn name(self) -> String {
        match self.kind {
            ScheduleKind::OneForwardOneBackward => "1f1b".to_owned(),
            ScheduleKind::Gpipe => "gpipe".to_owned(),
            ScheduleKind::Interleaved => format!("interleaved x {}", self.virtual_stages),
        }
    }

    /// The layout with `micro_batches` in a step, or why there is none.
    fn layout(self, subject: &Subject, micro_batches: usize) -> Result<Layout, String> {
        let asked = &subject.demand;
        let balance = asked
            .balance
            .clone()
            .filter(|_| self.stages == asked.devices.len());
        let demand = Demand {
            devices: asked.devices[..self.stages].to_vec(),
            balance,
            schedule: self.kind,
            virtual_stages: self.virtual_stages,
            micro_batches,
            ..asked.clone()
        };
        let memory = DeviceMemory::of_first(&subject.memory, self.stages, asked.transport);
        match demand.fit(&subject.model, &subject.trainables, &memory) {
            Ok(Fitted {
                layout,
                shortage: None,
            }) => Ok(layout),
            Ok(_) => Err("does not fit".to_owned()),
            Err(_) if !micro_batches.is_multiple_of(self.stages) => {
                Err(format!("no multiple of {}", self.stages))
            }
            Err(_) => Err("not possible".to_owned()),
        }
    }
}

fn forecast(subject: &Subject, options: &PlanOptions, layout: &Layout) -> Forecast {
    let typical = &subject.demand.typical;
    let operations = options.tflops * 1e12;
    let costs: Vec<_> = (0..layout.stages.len())
        .map(|rank| layout.chunk_costs(&subject.model, &subject.trainables, typical, rank))
        .collect();
    let seconds = |of: fn(&crate::pipeline::cost::ChunkCost) -> f64| -> Vec<Vec<f64>> {
        let stages = costs.iter();
        let stage = |chunks: &Vec<_>| chunks.iter().map(|cost| of(cost) / operations).collect();
        stages.map(stage).collect()
    };
    // Activations are exchanged in f32.
    let message = typical.rows * subject.model.hidden_size as f64 * 4.0;
    let prediction = layout.schedule.predict(
        &seconds(|cost| cost.forward),
        &seconds(|cost| cost.backward),
        message / (options.link_gbps * 1e9),
    );
    let stages = prediction.idle.len().max(1) as f64;
    let tokens = layout.schedule.micro_batches as f64 * typical.rows;
    Forecast {
        bubble: prediction.idle.iter().sum::<f64>() / stages,
        step_seconds: prediction.step_seconds,
        tokens_per_second: tokens / prediction.step_seconds,
    }
}

/// A table of layouts with what they would take, the fastest that fits marked.
pub fn compare(subject: &Subject, options: &PlanOptions) -> String {
    let asked = subject.demand.micro_batches;
    let counts = [asked, 2 * asked, 4 * asked];
    let choices = Choice::all(subject.demand.devices.len(), subject.model.num_layers);
    let rows: Vec<(Choice, Vec<Result<Forecast, String>>)> = choices
        .into_iter()
        .map(|choice| {
            let forecasts = counts.map(|count| {
                let layout = choice.layout(subject, count)?;
                Ok(forecast(subject, options, &layout))
            });
            (choice, forecasts.into())
        })
        .collect();
    let speed = |(_, forecasts): &(Choice, Vec<Result<Forecast, String>>)| {
        let asked = forecasts
            .first()
            .and_then(|forecast| forecast.as_ref().ok());
        asked.map_or(0.0, |forecast| forecast.tokens_per_second)
    };
    let best = rows.iter().map(speed).fold(0.0, f64::max);
    if rows
        .iter()
        .all(|(_, forecasts)| forecasts.iter().all(Result::is_err))
    {
        return "no number of stages, schedule or number of micro-batches makes it fit\n"
            .to_owned();
    }
    // Writing to a String cannot fail.
    let mut text = format!("  {:<6} {:<15}", "stages", "schedule");
    for count in counts {
        let _ = write!(text, "  {:>22}", format!("{count} micro-batches"));
    }
    let _ = write!(text, "\n  {:<6} {:<15}", "", "");
    for _ in counts {
        let _ = write!(text, "  {:>6} {:>7} {:>7}", "bubble", "step s", "tok/s");
    }
    text.push('\n');
    let mut marked = None;
    for row in &rows {
        let (choice, forecasts) = row;
        let is_best = marked.is_none() && best > 0.0 && speed(row) == best;
        if is_best {
            marked = Some(*choice);
        }
        let mark = if is_best { '*' } else { ' ' };
        let _ = write!(text, "{mark} {:<6} {:<15}", choice.stages, choice.name());
        for forecast in forecasts {
            let _ = match forecast {
                Ok(forecast) => write!(
                    text,
                    "  {:>5.1}% {:>7} {:>7.0}",
                    100.0 * forecast.bubble,
                    seconds(forecast.step_seconds),
                    forecast.tokens_per_second,
                ),
                Err(why) => write!(text, "  {why:>22}"),
            };
        }
        text.push('\n');
    }
    let fastest = match marked {
        Some(choice) => format!(
            "*: the fastest that fits with {asked} micro-batches, {} on {} {}.",
            choice.name(),
            choice.stages,
            if choice.stages == 1 {
                "device"
            } else {
                "devices"
            }
        ),
        None => format!("None fits with {asked} micro-batches."),
    };
    text + &wrapped(&format!(
        "{fastest} Predicted from matrix products alone, by assumption: {} TFLOP/s sustained by each \
         device (--tflops) and {} GB/s between them (--link-gbps). Where \
         memory is short, with recomputation. More micro-batches make larger steps.",
        options.tflops, options.link_gbps,
    ))
}

/// Three digits or so.
fn seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 100.0 => format!("{s:.0}"),
        s if s >= 1.0 => format!("{s:.2}"),
        s => format!("{s:.4}"),
    }
}
