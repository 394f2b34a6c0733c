//! Runs that are cut off in the middle and taken up again, laid out otherwise: they end as the run
//! that was left alone, to the last bit.

use std::fs;
use std::path::Path;

use rustix::process::Signal;

use super::family::family;
use super::layout::Layout;
use super::outcome::{Outcome, assert_same_metrics, checkpoints, metrics};
use super::program::{interrupt, lines, run, succeed};
use super::setup::Setup;

/// So many steps that a signal after the first dozens comes well before the end.
const STEPS: usize = 400;
/// The same where a step is a large one.
const LARGE_STEPS: usize = 80;

/// Interrupts a run (of which some steps may be done already) when its metrics have `rows` rows, and
/// says after how many steps it stopped.
#[track_caller]
fn stop_after(
    setup: &Setup,
    layout: Layout,
    output: &Path,
    rows: usize,
    signal: Signal,
    resume: bool,
) -> u64 {
    let mut command = setup.command(layout, output);
    if resume {
        command.arg("--resume");
    }
    let metrics_file = output.join("metrics.jsonl");
    let ended = interrupt(&mut command, signal, || lines(&metrics_file) >= rows);
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    let done = metrics(output).len() as u64;
    assert!(done >= rows as u64);
    let said = format!("stopped after step {done};");
    assert!(ended.stderr.contains(&said), "{}", ended.stderr);
    assert_eq!(checkpoints(output).last(), Some(&done));
    assert!(!output.join("adapter").exists() && !output.join("model").exists());
    done
}

#[track_caller]
fn finish(setup: &Setup, layout: Layout, output: &Path) -> Outcome {
    succeed(setup.command(layout, output).arg("--resume"));
    Outcome::read(output)
}

/// Left alone on the first layout; stopped by each signal in turn on the following ones; finished on
/// the last.
fn interrupted_as_if_not(setup: &mut Setup, steps: usize, layouts: &[Layout], signals: &[Signal]) {
    setup.set_steps(steps);
    setup.set("--log-steps", "50");
    let alone = setup.output("alone");
    succeed(&mut setup.command(layouts[0], &alone));
    let expected = Outcome::read(&alone);

    let output = setup.output("interrupted");
    for (turn, &signal) in signals.iter().enumerate() {
        let rows = (turn + 1) * steps / (2 * signals.len() + 2);
        stop_after(setup, layouts[turn + 1], &output, rows, signal, turn > 0);
    }
    let found = finish(setup, layouts[signals.len() + 1], &output);
    found.assert_equals(&expected, &format!("{layouts:?}"));
}

fn at_most(stages: usize) -> usize {
    stages.min(family().most_stages())
}

#[test]
fn lora_stopped_by_sigterm() {
    let mut setup = Setup::golden("lora_train");
    let layouts = [
        Layout::new(1, "1f1b", "none", 1),
        Layout::new(at_most(3), "1f1b", "none", 2),
        Layout::new(at_most(2), "gpipe", "block", 1),
    ];
    interrupted_as_if_not(&mut setup, STEPS, &layouts, &[Signal::TERM]);
}

#[test]
fn lora_with_dropout_on_every_layer_stopped_by_ctrl_c_and_again_by_sigterm() {
    let mut setup = Setup::golden("lora_train");
    setup.unset("--init-adapter");
    setup.set(
        "--target-modules",
        "query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
    );
    setup.set("--r", "3");
    setup.set("--lora-dropout", "0.2");
    setup.shuffle();
    let layouts = [
        Layout::new(at_most(2), "1f1b", "none", 2),
        Layout::new(1, "gpipe", "attention_free", 1),
        Layout::new(at_most(4), "1f1b", "block", 2),
        Layout::new(at_most(3), "gpipe", "none", 3),
    ];
    interrupted_as_if_not(
        &mut setup,
        LARGE_STEPS,
        &layouts,
        &[Signal::INT, Signal::TERM],
    );
}

#[test]
fn prefix_with_dropout_stopped_by_sigterm() {
    let mut setup = Setup::golden("ptuning_train");
    setup.unset("--init-adapter");
    setup.set("--prefix-dropout", "0.3");
    setup.shuffle();
    let layouts = [
        Layout::new(1, "1f1b", "none", 2),
        Layout::new(at_most(2), "1f1b", "attention_free", 1),
        Layout::new(at_most(4), "gpipe", "block", 2),
    ];
    interrupted_as_if_not(&mut setup, LARGE_STEPS, &layouts, &[Signal::TERM]);
}

#[test]
fn projected_prefix_with_dropout_stopped_by_sigterm() {
    let mut setup = Setup::golden("ptuning_projection_train");
    setup.set("--prefix-dropout", "0.1");
    setup.shuffle();
    let layouts = [
        Layout::new(at_most(4), "gpipe", "none", 1),
        Layout::new(at_most(3), "1f1b", "block", 2),
        Layout::new(1, "gpipe", "none", 2),
    ];
    interrupted_as_if_not(&mut setup, LARGE_STEPS, &layouts, &[Signal::TERM]);
}

#[test]
fn tied_whole_model_stopped_by_sigterm() {
    let mut setup = Setup::golden("full_finetune_tied");
    let layouts = [
        Layout::new(1, "1f1b", "none", 1),
        Layout::new(at_most(2), "gpipe", "attention_free", 2),
        Layout::new(at_most(3), "1f1b", "none", 2),
    ];
    interrupted_as_if_not(&mut setup, STEPS, &layouts, &[Signal::TERM]);
}

#[test]
fn half_precision_stopped_by_sigterm() {
    let mut setup = Setup::golden("lora_train");
    setup.set("--precision", "f16");
    setup.set("--lora-dropout", "0.1");
    let layouts = [
        Layout::new(1, "1f1b", "none", 1),
        Layout::new(at_most(2), "gpipe", "attention_free", 2),
        Layout::new(at_most(3), "1f1b", "block", 2),
    ];
    interrupted_as_if_not(&mut setup, STEPS, &layouts, &[Signal::TERM]);
}

#[test]
fn killed_between_checkpoints_and_resumed() {
    let mut setup = Setup::golden("lora_train");
    setup.set_steps(STEPS);
    setup.set("--save-steps", "30");
    let alone = setup.output("alone");
    succeed(&mut setup.command(Layout::new(1, "1f1b", "none", 1), &alone));
    let expected = Outcome::read(&alone);
    assert_eq!(
        checkpoints(&alone),
        [360, 390, 400],
        "save_total_limit is 3"
    );

    let output = setup.output("killed");
    let layout = Layout::new(at_most(3), "1f1b", "none", 2);
    let metrics_file = output.join("metrics.jsonl");
    let half = STEPS / 2;
    let mut command = setup.command(layout, &output);
    let ended = interrupt(&mut command, Signal::KILL, || lines(&metrics_file) >= half);
    assert_eq!(ended.code, None, "{}", ended.stderr);
    assert!(lines(&metrics_file) < STEPS);
    assert!(!output.join("adapter").exists());

    let layout = Layout::new(at_most(2), "gpipe", "attention_free", 1);
    let found = finish(&setup, layout, &output);
    found.assert_equals(&expected, "after a kill");
    assert_eq!(checkpoints(&output), checkpoints(&alone));
}

#[test]
fn resumed_from_a_named_checkpoint_into_another_folder() {
    let mut setup = Setup::golden("ptuning_projection_train");
    setup.set_steps(24);
    setup.set("--save-steps", "7");
    let alone = setup.output("alone");
    succeed(&mut setup.command(Layout::new(1, "gpipe", "none", 1), &alone));
    let expected = Outcome::read(&alone);
    let steps = expected.metrics.len();
    let kept = checkpoints(&alone);
    assert_eq!(kept.len(), 3);

    let from = kept[1] as usize;
    let output = setup.output("branch");
    let layout = Layout::new(at_most(3), "1f1b", "block", 2);
    let mut command = setup.command(layout, &output);
    command
        .arg("--resume")
        .arg(alone.join(format!("checkpoint-{from}")));
    succeed(&mut command);
    let found = Outcome::read(&output);
    assert!(0 < from && from < steps);
    assert_same_metrics(&found.metrics, &expected.metrics[from..], "branch");
    assert!(found.files == expected.files);
}

#[test]
fn resuming_a_finished_run_changes_nothing_and_a_longer_one_goes_on() {
    let mut setup = Setup::golden("lora_train");
    setup.set("--lr-schedule", "constant");
    let output = setup.output("run");
    let layout = Layout::new(at_most(2), "1f1b", "none", 1);
    succeed(&mut setup.command(layout, &output));
    let before = Outcome::read(&output);
    finish(&setup, layout, &output).assert_equals(&before, "resumed at its end");

    let steps = before.metrics.len();
    setup.set("--max-steps", &(steps + 10).to_string());
    let longer = finish(&setup, layout, &output);
    let straight = setup.output("straight");
    succeed(&mut setup.command(layout, &straight));
    let expected = Outcome::read(&straight);
    // The rows before say how long the run was to be then.
    assert_same_metrics(
        &longer.metrics[steps..],
        &expected.metrics[steps..],
        "longer",
    );
    assert!(longer.files == expected.files);
}

#[test]
fn a_damaged_newest_checkpoint_is_passed_over_with_a_warning() {
    let mut setup = Setup::golden("lora_train");
    setup.set_steps(24);
    setup.set("--save-steps", "10");
    let output = setup.output("run");
    let layout = Layout::new(1, "1f1b", "none", 2);
    succeed(&mut setup.command(layout, &output));
    let expected = Outcome::read(&output);
    let kept = checkpoints(&output);
    let newest = output.join(format!("checkpoint-{}/state.safetensors", kept[2]));
    let mut bytes = fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&newest, bytes).unwrap();

    let ended = run(setup.command(layout, &output).arg("--resume"));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("is passed over"), "{}", ended.stderr);
    Outcome::read(&output).assert_equals(&expected, "from the one before");
}
