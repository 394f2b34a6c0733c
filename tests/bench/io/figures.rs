//! Figures taken in turn, and what becomes of them.

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

/// One thing that is measured: its name, and the seconds of one run.
pub type Case<'a> = (String, Box<dyn FnMut() -> f64 + 'a>);

/// Seconds that `work` takes; what it returns is dropped outside of them.
pub fn seconds<R>(work: impl FnOnce() -> R) -> f64 {
    let began = Instant::now();
    let made = work();
    let seconds = began.elapsed().as_secs_f64();
    drop(made);
    seconds
}

/// All figures of a run of this bench.
pub struct Report {
    pub runs: usize,
    pub threads: usize,
    sections: Vec<Value>,
}

impl Report {
    pub fn new(runs: usize, threads: usize) -> Self {
        Report {
            runs,
            threads,
            sections: Vec::new(),
        }
    }

    /// Measures every case once, then every case again, and so on, after one round that does not count.
    /// `amount` of `unit` is what each of them does in its seconds.
    pub fn in_turn(&mut self, section: &str, amount: f64, unit: &str, mut cases: Vec<Case<'_>>) {
        let mut taken = vec![Vec::new(); cases.len()];
        for round in 0..=self.runs {
            for ((_, case), taken) in cases.iter_mut().zip(&mut taken) {
                let seconds = case();
                if round > 0 {
                    taken.push(seconds);
                }
            }
        }
        let figures: Vec<(String, Vec<f64>)> =
            cases.into_iter().map(|(name, _)| name).zip(taken).collect();
        self.add(section, amount, unit, &figures);
    }

    /// Adds figures that were taken elsewhere: seconds of every run.
    pub fn add(&mut self, section: &str, amount: f64, unit: &str, figures: &[(String, Vec<f64>)]) {
        let figure = |(name, seconds): &(String, Vec<f64>)| {
            let mut sorted = seconds.clone();
            sorted.sort_by(f64::total_cmp);
            let median = sorted[sorted.len() / 2];
            json!({
                "name": name,
                "seconds": { "median": rounded(median), "lowest": rounded(sorted[0]),
                    "highest": rounded(sorted[sorted.len() - 1]), "runs": sorted.len() },
                "per_second": rounded(amount / median),
            })
        };
        let figures: Vec<Value> = figures.iter().map(figure).collect();
        self.sections.push(json!({
            "section": section, "amount": rounded(amount), "unit": unit, "figures": figures,
        }));
    }

    /// The figures as tables in Markdown.
    pub fn tables(&self) -> String {
        let mut text = String::new();
        for section in &self.sections {
            let unit = section["unit"].as_str().unwrap();
            let title = section["section"].as_str().unwrap();
            let amount = &section["amount"];
            text += &format!("\n**{title}** ({amount} {unit})\n\n");
            text += &format!("| | seconds (median) | lowest | highest | runs | {unit}/s |\n");
            text += "| --- | --- | --- | --- | --- | --- |\n";
            for figure in section["figures"].as_array().unwrap() {
                let seconds = &figure["seconds"];
                text += &format!(
                    "| {} | {} | {} | {} | {} | {} |\n",
                    figure["name"].as_str().unwrap(),
                    seconds["median"],
                    seconds["lowest"],
                    seconds["highest"],
                    seconds["runs"],
                    figure["per_second"],
                );
            }
        }
        text
    }

    /// The figures with machine and commit as JSON, and as tables beside it.
    pub fn write(&self, path: &Path) {
        let said = |name: &str| std::env::var(name).unwrap_or_else(|_| "not said".to_owned());
        let whole = json!({
            "command": said("IO_COMMAND"),
            "commit": said("IO_COMMIT"),
            "date": said("IO_DATE"),
            "profile": match cfg!(debug_assertions) { true => "dev", false => "release" },
            "machine": {
                "processor": line("/proc/cpuinfo", "model name"),
                "threads": self.threads,
                "memory": line("/proc/meminfo", "MemTotal"),
                "system": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim(),
                "huge_pages": std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
                    .unwrap_or_default().trim(),
                "load_at_end": std::fs::read_to_string("/proc/loadavg").unwrap().trim(),
            },
            "runs": self.runs,
            "sections": self.sections,
        });
        let mut text = serde_json::to_string_pretty(&whole).unwrap();
        text.push('\n');
        std::fs::write(path, text).unwrap();
        let [command, commit, date] = ["command", "commit", "date"].map(|key| &whole[key]);
        let machine = &whole["machine"];
        let [processor, threads, memory, load] =
            ["processor", "threads", "memory", "load_at_end"].map(|key| &machine[key]);
        let lead = format!(
            "Written by {command} at commit {commit}, {date}: {processor}, {threads} threads, {memory}, \
             load at the end {load}. What each figure is stands in \
             [PERFORMANCE.md](../PERFORMANCE.md#loading-a-model).\n"
        );
        let tables = lead.replace('"', "") + &self.tables();
        std::fs::write(path.with_extension("md"), tables).unwrap();
    }
}

/// Four digits that count.
fn rounded(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap()
}

fn line(file: &str, key: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let value = line.and_then(|rest| rest.split_once(':'));
    value
        .map_or("not said", |(_, value)| value.trim())
        .to_owned()
}
