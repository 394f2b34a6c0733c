//! `mp-train check`.

use super::args::CheckArgs;
use super::failure::{Failure, FailureClass};
use super::{WHERE_TO_GET_A_MODEL, print, signals};
use crate::check::Report;

pub(super) fn run(args: &CheckArgs) -> Result<(), Failure> {
    if args.config.is_bare() {
        let nothing = "no run to check: neither --model nor --config was given";
        return Err(Failure::user(nothing).hint(WHERE_TO_GET_A_MODEL));
    }
    let config = args.config.resolve()?;
    let stop = signals::stop_flag().map_err(|error| Failure::new(FailureClass::Machine, &error))?;
    let Some(report) = crate::check::run(&config, &stop) else {
        return Err(Failure::interrupted(
            "stopped before everything was looked at",
        ));
    };
    let text = match args.json {
        true => json(&report)?,
        false => report.text(),
    };
    print(&text)?;
    let warnings = match report.warnings() {
        0 => String::new(),
        1 => ", and 1 warning".to_owned(),
        warnings => format!(", and {warnings} warnings"),
    };
    match report.problems() {
        0 if args.json => Ok(()),
        0 => print(&format!(
            "nothing found that would stop the run{warnings}\n"
        )),
        1 => Err(Failure::user(format!(
            "1 problem{warnings}: the run would not go through"
        ))),
        problems => Err(Failure::user(format!(
            "{problems} problems{warnings}: the run would not go through"
        ))),
    }
}

fn json(report: &Report) -> Result<String, Failure> {
    let text = serde_json::to_string_pretty(report);
    let text = text.map_err(|error| Failure::new(FailureClass::Machine, &error))?;
    Ok(format!("{text}\n"))
}
