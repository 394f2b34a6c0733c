//! The progress line, for a person.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};

use super::{
    EvaluatingReport, Event, MemoryReport, RunFinished, RunStarted, StepReport, TokenisingReport,
};

/// How progress is shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Style {
    /// Redraw one line for the steps between two lines that stay; needs a terminal.
    pub live: bool,
    /// Use colour; needs a terminal.
    pub colour: bool,
    /// Show warnings only.
    pub quiet: bool,
}

impl Style {
    /// What suits standard error: live and coloured on a terminal, plain text elsewhere. `NO_COLOR`
    /// (set to anything but nothing, <https://no-color.org>) switches colour off.
    pub fn for_stderr(quiet: bool) -> Self {
        let live = std::io::stderr().is_terminal()
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Style {
            live,
            colour: live && !no_colour,
            quiet,
        }
    }
}

/// Seconds within which nobody asks how far it is.
const AT_ONCE: f64 = 0.5;

/// Writes events as lines of text.
#[derive(Debug)]
pub struct Progress<W: Write> {
    out: W,
    style: Style,
    log_steps: u64,
    /// Mean wall time of a step, newer steps weighing more.
    step_seconds: Option<f64>,
    /// Steps, targets, tokens and seconds since the last line that stayed.
    since: Totals,
    /// Whether the last thing written is a live line that the next one replaces.
    is_line_open: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    target_tokens: u64,
    tokens: u64,
    seconds: f64,
}

impl<W: Write> Progress<W> {
    /// Progress on `out`, with one lasting line every `log_steps` steps.
    pub fn new(out: W, style: Style, log_steps: u64) -> Self {
        Progress {
            out,
            style,
            log_steps: log_steps.max(1),
            step_seconds: None,
            since: Totals::default(),
            is_line_open: false,
        }
    }

    /// Shows one event. A terminal that has gone away is not a reason to end a run: errors of `out` are
    /// ignored.
    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Warning(text) => {
                self.line(&format!("{} {text}", self.painted("33", "warning:")))
            }
            _ if self.style.quiet => {}
            Event::RunStarted(run) => self.line(&started(run)),
            Event::Step(report) => self.step(report),
            Event::CheckpointSaved { path, step } => {
                self.line(&format!(
                    "checkpoint of step {step} saved in {}",
                    path.display()
                ));
            }
            Event::Validation(report) => self.line(&format!(
                "validation after step {}: loss {:.4} over {} targets",
                report.step,
                report.loss,
                grouped(report.target_tokens)
            )),
            Event::Tokenising(report) => self.tokenising(report),
            Event::Evaluating(report) => self.evaluating(report),
            Event::Memory(report) => self.line(&memory_use(report)),
            Event::Finished(run) => self.line(&finished(run)),
        }
    }

    /// A live line for every row, and ten that stay.
    fn evaluating(&mut self, report: &EvaluatingReport) {
        if report.seconds < AT_ONCE {
            return;
        }
        let (rows, total) = (report.rows, report.total_rows.max(1));
        let left = total.saturating_sub(rows) as f64 / rows.max(1) as f64;
        let text = format!(
            "{}: {}/{} rows  eta {}",
            report.what,
            grouped(rows),
            grouped(total),
            duration(report.seconds * left),
        );
        let tenth = |rows: u64| rows.saturating_mul(10) / total;
        match tenth(rows) > tenth(rows.saturating_sub(1)) {
            true => self.line(&text),
            false if self.style.live => self.live_line(&text),
            false => {}
        }
    }

    fn tokenising(&mut self, report: &TokenisingReport) {
        if report.seconds < AT_ONCE {
            return;
        }
        let share = report.bytes as f64 / report.total_bytes.max(1) as f64;
        let text = format!(
            "tokenising: {:.0} %  {} rows  {} tokens  {} tok/s",
            100.0 * share.min(1.0),
            grouped(report.rows),
            grouped(report.tokens),
            rate(report.tokens, report.seconds),
        );
        match report.done {
            true => self.line(&text),
            false if self.style.live => self.live_line(&text),
            false => {}
        }
    }

    fn step(&mut self, report: &StepReport) {
        // The first steps are slow (caches, page faults); a weight of 1/10 forgets them soon.
        self.step_seconds = Some(match self.step_seconds {
            None => report.seconds,
            Some(mean) => mean + (report.seconds - mean) / 10.0,
        });
        self.since.target_tokens += report.target_tokens;
        self.since.tokens += report.tokens;
        self.since.seconds += report.seconds;
        let stays = report.step.is_multiple_of(self.log_steps) || report.step == report.max_steps;
        if !stays && !self.style.live {
            return;
        }
        let text = self.step_text(report);
        if stays {
            self.since = Totals::default();
            self.line(&text);
        } else {
            self.live_line(&text);
        }
    }

    fn step_text(&self, report: &StepReport) -> String {
        let width = report.max_steps.to_string().len();
        let mut text = format!(
            "step {:>width$}/{}  loss {}  lr {:.2e}  norm {}{}",
            report.step,
            report.max_steps,
            self.painted("1", &format!("{:.4}", report.loss)),
            report.learning_rate,
            norm(report.grad_norm),
            if report.clipped { " clipped" } else { "" },
        );
        if report.skipped {
            let scale = format!("SKIPPED (not finite, scale {})", report.loss_scale);
            // Writing to a String cannot fail.
            let _ = write!(text, "  {}", self.painted("33", &scale));
        }
        let Totals {
            target_tokens,
            tokens,
            seconds,
        } = self.since;
        let left = report.max_steps.saturating_sub(report.step);
        let _ = write!(
            text,
            "  {} target tok/s  {} tok/s{}  eta {}",
            rate(target_tokens, seconds),
            rate(tokens, seconds),
            memory(),
            duration(self.step_seconds.unwrap_or(0.0) * left as f64),
        );
        text
    }

    fn painted(&self, code: &str, text: &str) -> String {
        match self.style.colour {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }

    fn line(&mut self, text: &str) {
        let _ = writeln!(self.out, "{}{text}", self.back_to_start());
        self.is_line_open = false;
    }

    fn live_line(&mut self, text: &str) {
        // Without line wrap: of a wrapped line only the last row could be cleared.
        let _ = write!(self.out, "{}\x1b[?7l{text}\x1b[?7h", self.back_to_start());
        let _ = self.out.flush();
        self.is_line_open = true;
    }

    fn back_to_start(&self) -> &'static str {
        if self.is_line_open { "\r\x1b[K" } else { "" }
    }
}

impl<W: Write> Drop for Progress<W> {
    /// What comes after the progress starts on a line of its own.
    fn drop(&mut self) {
        if self.is_line_open {
            let _ = writeln!(self.out);
        }
    }
}

fn started(run: &RunStarted) -> String {
    let stages: Vec<String> = run
        .stages
        .iter()
        .map(|stage| {
            let runs = stage.blocks.iter();
            let runs: Vec<String> = runs
                .map(|run| format!("{}..{}", run.start, run.end))
                .collect();
            format!("{} [{}]", stage.device, runs.join(" "))
        })
        .collect();
    let mut text = format!(
        "training {} of {} parameters; stages and their blocks: {}\n",
        grouped(run.trainable_parameters),
        grouped(run.model_parameters),
        stages.join(", "),
    );
    if !run.transport.is_empty() {
        let _ = writeln!(text, "activations travel by {}", run.transport);
    }
    let _ = write!(text, "configuration saved in {}", run.config_path.display());
    if run.start_step > 0 {
        let _ = write!(
            text,
            "\nresumed after step {} of {}",
            run.start_step, run.max_steps
        );
    }
    text
}

fn memory_use(report: &MemoryReport) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let stages = report.stages.iter().enumerate().map(|(rank, stage)| {
        let mut text = format!(
            "memory of stage {rank} on device {}: {:.1} MiB planned, {:.1} MiB used",
            stage.device,
            mib(stage.planned_bytes),
            mib(stage.used_bytes),
        );
        if stage.beside_bytes > 0 {
            // Writing to a String cannot fail.
            let _ = write!(text, ", {:.1} MiB beside it", mib(stage.beside_bytes));
        }
        text
    });
    stages.collect::<Vec<_>>().join("\n")
}

fn finished(run: &RunFinished) -> String {
    let RunFinished {
        steps,
        seconds,
        result,
    } = run;
    format!(
        "done: {steps} steps in {}, saved in {}",
        duration(*seconds),
        result.display()
    )
}

/// Things per second, in whole numbers; `-` when no time has passed.
fn rate(count: u64, seconds: f64) -> String {
    match seconds > 0.0 {
        true => grouped((count as f64 / seconds).round() as u64),
        false => "-".to_owned(),
    }
}

/// What the process has in memory now, where the system says so (Linux).
fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(String::new(), |kib| format!("  {} MiB", grouped(kib >> 10)))
}

/// A gradient norm with three digits that say something; a prefix's is often far below 0.001.
fn norm(value: f32) -> String {
    match value != 0.0 && value.abs() < 0.1 {
        true => format!("{value:.2e}"),
        false => format!("{value:.3}"),
    }
}

/// `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `h:mm:ss`.
fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    format!(
        "{}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn report(step: u64) -> Event {
        Event::Step(StepReport {
            step,
            max_steps: 30,
            loss: 5.7771,
            micro_losses: vec![5.7771],
            learning_rate: 1e-3,
            grad_norm: 2.1125,
            clipped: true,
            skipped: false,
            loss_scale: 1.0,
            target_tokens: 1000,
            tokens: 4000,
            seconds: 0.5,
        })
    }

    fn shown(style: Style, log_steps: u64, events: &[Event]) -> String {
        let mut out = Vec::new();
        let mut progress = Progress::new(&mut out, style, log_steps);
        events.iter().for_each(|event| progress.show(event));
        drop(progress);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_plain_line_has_everything_and_no_control_characters() {
        let text = shown(Style::default(), 1, &[report(6)]);
        let expected = "step  6/30  loss 5.7771  lr 1.00e-3  norm 2.112 clipped  \
                        2,000 target tok/s  8,000 tok/s  eta 0:00:12\n";
        let (before, rest) = text.split_once("8,000 tok/s").unwrap();
        let (memory, after) = rest.split_once("  eta").unwrap();
        assert_eq!(format!("{before}8,000 tok/s  eta{after}"), expected);
        let mib = memory.trim().trim_end_matches(" MiB");
        let counted = mib.chars().all(|c| c.is_ascii_digit() || c == ',');
        assert!(
            counted && !mib.is_empty() || !cfg!(target_os = "linux"),
            "{memory:?}"
        );
    }

    #[test]
    fn lines_between_log_steps_are_live_on_a_terminal_and_absent_elsewhere() {
        let events = [report(1), report(2), report(3)];
        let plain = shown(Style::default(), 2, &events);
        assert_eq!(plain.lines().count(), 1);
        assert!(plain.starts_with("step  2/30"));
        let live = shown(
            Style {
                live: true,
                ..Style::default()
            },
            2,
            &events,
        );
        assert_eq!(live.matches("\r\x1b[K").count(), 1, "{live:?}");
        assert_eq!(live.matches('\n').count(), 2, "{live:?}");
        assert!(
            !live.contains("\x1b[1m"),
            "colour was not asked for: {live:?}"
        );
    }

    #[test]
    fn the_last_step_always_stays() {
        assert!(shown(Style::default(), 7, &[report(30)]).ends_with("eta 0:00:00\n"));
    }

    #[test]
    fn ten_lines_of_an_evaluation_stay() {
        let event = |rows: u64, seconds: f64| {
            Event::Evaluating(EvaluatingReport {
                what: "answers",
                rows,
                total_rows: 1070,
                seconds,
            })
        };
        let events: Vec<Event> = (1..=1070).map(|rows| event(rows, rows as f64)).collect();
        let plain = shown(Style::default(), 1, &events);
        assert_eq!(plain.lines().count(), 10);
        assert!(plain.starts_with("answers: 107/1,070 rows  eta 0:16:03\n"));
        assert!(plain.ends_with("answers: 1,070/1,070 rows  eta 0:00:00\n"));
        assert_eq!(shown(Style::default(), 1, &[event(1070, 0.1)]), "");
    }

    #[test]
    fn quiet_leaves_warnings_alone() {
        let style = Style {
            quiet: true,
            ..Style::default()
        };
        let text = shown(
            style,
            1,
            &[report(1), Event::Warning("heads differ".to_owned())],
        );
        assert_eq!(text, "warning: heads differ\n");
    }

    #[test]
    fn numbers_are_grouped_and_times_padded() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(duration(3_725.4), "1:02:05");
        assert_eq!(rate(5, 0.0), "-");
    }
}
