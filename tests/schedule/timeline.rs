//! Schedules against the clock.

use mp_train::config::run::ScheduleKind;
use mp_train::pipeline::profile::{ActionSpan, SpanKind, StageProfile, StepProfile, WorkSeconds};
use mp_train::pipeline::schedule::{Action, Flow, Schedule, Transfers};

use super::{for_all_schedules, name};

#[test]
fn idle_time_is_that_of_the_formula() {
    for_all_schedules(|schedule, what| {
        for (forward, backward) in [(1, 1), (1, 2), (3, 1)] {
            let idle = schedule.idle_fraction(forward, backward);
            let expected = schedule.bubble();
            assert!(
                (idle - expected).abs() < 1e-12,
                "{what}, {forward}:{backward}: {idle} {expected}"
            );
        }
    });
}

#[test]
fn the_formula_gives_the_figures_of_the_design() {
    let percent = |schedule: Schedule| (schedule.bubble() * 1000.0).round() / 10.0;
    assert_eq!(percent(Schedule::one_forward_one_backward(2, 16)), 5.9);
    assert_eq!(percent(Schedule::one_forward_one_backward(4, 16)), 15.8);
    assert_eq!(percent(Schedule::interleaved(4, 2, 16).unwrap()), 8.6);
    assert_eq!(percent(Schedule::gpipe(1, 3)), 0.0);
}

#[test]
fn the_grid_is_drawn_to_time() {
    let expected = "\
stage 0 | F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
stage 1 | .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
stage 2 | .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .
";
    assert_eq!(
        Schedule::one_forward_one_backward(3, 4).grid(1, 1),
        expected
    );
    let expected = "\
stage 0 | F0 F1 .  .  .  B0 -- B1 --
stage 1 | .  F0 F1 B0 -- B1 -- .  .
";
    assert_eq!(Schedule::gpipe(2, 2).grid(1, 2), expected);
    let expected = "\
stage 0 | F0   F1   F0.1 F1.1 .    B0.1 .    B1.1 B0   B1
stage 1 | .    F0   F1   F0.1 B0.1 F1.1 B1.1 B0   B1   .
";
    assert_eq!(Schedule::interleaved(2, 2, 2).unwrap().grid(1, 1), expected);
}

#[test]
fn drawing_a_schedule_that_cannot_run_ends() {
    let (f, b) = (|i| Action::forward(i, 0), |i| Action::backward(i, 0));
    let stuck = Schedule {
        kind: ScheduleKind::Gpipe,
        micro_batches: 2,
        virtual_stages: 1,
        stages: vec![vec![f(0), b(0), f(1), b(1)], vec![f(0), f(1), b(0), b(1)]],
    };
    assert_eq!(stuck.grid(1, 1), "stage 0 | F0 .\nstage 1 | .  F0\n");
    assert!((stuck.idle_fraction(1, 1) - 0.5).abs() < 1e-12);
    let none = Schedule {
        stages: Vec::new(),
        ..stuck
    };
    assert_eq!(none.grid(1, 1), "");
    assert_eq!(none.idle_fraction(1, 1), 0.0);
}

fn equal(schedule: &Schedule, cost: f64) -> Vec<Vec<f64>> {
    vec![vec![cost; schedule.virtual_stages]; schedule.stages.len()]
}

/// Equal stages and instant transfers: the step takes what its actions take, and the bubble.
#[test]
fn a_prediction_without_transfer_time_has_the_bubble_of_the_formula() {
    for_all_schedules(|schedule, what| {
        let prediction = schedule.predict(&equal(schedule, 0.25), &equal(schedule, 0.5), 0.0);
        let work = 0.75 * (schedule.micro_batches * schedule.virtual_stages) as f64;
        let expected = work / (1.0 - schedule.bubble());
        assert!(
            (prediction.step_seconds - expected).abs() < 1e-9,
            "{what}: {prediction:?}, {expected}"
        );
        for idle in prediction.idle {
            assert!((idle - schedule.bubble()).abs() < 1e-9, "{what}: {idle}");
        }
    });
}

#[test]
fn a_prediction_adds_up() {
    // One micro-batch over two stages: there, across, there, back, across, back.
    let one = Schedule::one_forward_one_backward(2, 1);
    let prediction = one.predict(&[vec![1.0], vec![2.0]], &[vec![3.0], vec![4.0]], 0.5);
    assert_eq!(prediction.step_seconds, 1.0 + 0.5 + 2.0 + 4.0 + 0.5 + 3.0);
    assert_eq!(prediction.idle, [1.0 - 4.0 / 11.0, 1.0 - 6.0 / 11.0]);

    // A stage that costs more than the others sets the pace, and is idle only at the ends.
    let schedule = Schedule::one_forward_one_backward(3, 32);
    let (forward, backward) = (
        [vec![1.0], vec![4.0], vec![1.0]],
        [vec![2.0], vec![8.0], vec![2.0]],
    );
    let prediction = schedule.predict(&forward, &backward, 0.0);
    assert_eq!(prediction.step_seconds, 32.0 * 12.0 + 1.0 + 2.0);
    assert!(prediction.idle[1] < 0.01 && prediction.idle[0] > 0.7);

    // Chunks of different cost: each action counts with that of its own.
    let schedule = Schedule::interleaved(2, 2, 2).unwrap();
    let prediction = schedule.predict(
        &[vec![1.0, 2.0], vec![4.0, 8.0]],
        &[vec![0.0; 2], vec![0.0; 2]],
        0.0,
    );
    let busy = |idle: f64| (1.0 - idle) * prediction.step_seconds;
    assert!((busy(prediction.idle[0]) - 6.0).abs() < 1e-9);
    assert!((busy(prediction.idle[1]) - 24.0).abs() < 1e-9);

    // What is not given costs nothing.
    let prediction = one.predict(&[], &[], 0.0);
    assert_eq!(
        (prediction.step_seconds, prediction.idle),
        (0.0, vec![0.0; 2])
    );
}

#[test]
fn transfers_cost_time_and_never_save_any() {
    for schedule in [
        Schedule::one_forward_one_backward(4, 16),
        Schedule::gpipe(4, 16),
        Schedule::interleaved(4, 7, 16).unwrap(),
    ] {
        let at = |transfer| {
            let (forward, backward) = (equal(&schedule, 1.0), equal(&schedule, 2.0));
            schedule.predict(&forward, &backward, transfer).step_seconds
        };
        let steps: Vec<f64> = [0.0, 0.01, 0.1, 0.5, 1.0, 5.0].map(at).to_vec();
        let grows = steps.windows(2).all(|pair| pair[0] < pair[1]);
        assert!(grows, "{}: {steps:?}", name(&schedule));
    }
}

/// A measured step of made-up times, in which nobody had to wait: an action takes as many times longer as
/// the number of its stage, from 1, says.
fn measured(schedule: &Schedule, slowdown: f64) -> StepProfile {
    let stage = |(rank, actions): (usize, &Vec<Action>)| {
        let mut spans: Vec<ActionSpan> = Vec::new();
        let mut add = |what, seconds: f64| {
            let begin = spans.last().map_or(0.0, |span: &ActionSpan| span.end);
            let end = begin + slowdown * seconds;
            spans.push(ActionSpan { what, begin, end });
        };
        add(SpanKind::Prepare, 0.5);
        for &action in actions {
            let costs = [1.0, 2.0].map(|cost| cost * (rank + 1) as f64);
            if action.flow == Flow::Forward {
                add(SpanKind::Prepare, 0.25);
            }
            add(SpanKind::Wait(action.flow), 0.0);
            add(SpanKind::Run(action), costs[action.flow as usize]);
            if schedule.destination(rank, action).is_some() {
                add(SpanKind::Exchange(action.flow), 0.125);
            }
        }
        add(SpanKind::Update, 0.75);
        add(SpanKind::Agree, 0.0625 * (rank + 1) as f64);
        add(SpanKind::Update, 1.5);
        let work = WorkSeconds::default();
        StageProfile { spans, work }
    };
    let stages: Vec<_> = schedule.stages.iter().enumerate().map(stage).collect();
    let ends = stages.iter().map(|stage| stage.spans.last().unwrap().end);
    StepProfile {
        seconds: ends.fold(0.0, f64::max),
        stages,
    }
}

#[test]
fn a_step_takes_what_its_measured_parts_add_up_to() {
    let ends = 0.5 + 0.75 + 0.0625 + 1.5;
    // Alone: everything one after the other.
    let alone = Schedule::one_forward_one_backward(1, 5);
    let steps = [1.0, 3.0, 1.0].map(|slowdown| measured(&alone, slowdown));
    let times = alone.action_times(&steps);
    let predicted = alone.predict_measured(Transfers::Buffered, &times);
    assert_eq!(predicted.step_seconds, ends + 5.0 * (0.25 + 1.0 + 2.0));
    // Two stages, the second twice as slow and without an output forwards: it is waited for by all, once
    // it has its first input, and the first has one backward more.
    let both = Schedule::one_forward_one_backward(2, 4);
    let times = both.action_times(&[measured(&both, 1.0)]);
    assert_eq!(times.forward, [[0.25 + 1.0 + 0.125], [0.25 + 2.0]]);
    assert_eq!(times.backward, [[2.0], [4.0 + 0.125]]);
    assert_eq!(times.begin, [0.5, 0.5]);
    assert_eq!((times.agreement, times.transfer), (0.0625, 0.0));
    let predicted = both.predict_measured(Transfers::Buffered, &times);
    let busy = 4.0 * (2.25 + 4.125);
    assert_eq!(predicted.step_seconds, ends + 1.375 + busy + 2.0);
    assert!((predicted.idle[1] - (1.0 - busy / predicted.step_seconds)).abs() < 1e-12);
    // Nothing measured is nothing predicted.
    let times = both.action_times(&[]);
    let predicted = both.predict_measured(Transfers::Grouped, &times);
    assert_eq!(predicted.step_seconds, 0.0);
}
