//! `mp-train plan`.

use super::args::ConfigArgs;
use super::failure::Failure;
use super::{WHERE_TO_GET_A_MODEL, print};
use crate::plan::PlanError;

pub(super) fn run(args: &ConfigArgs) -> Result<(), Failure> {
    if args.is_bare() {
        let nothing = "no model to plan for: neither --model nor --config was given";
        return Err(Failure::user(nothing).hint(WHERE_TO_GET_A_MODEL));
    }
    print(&crate::plan::describe(&args.resolve()?)?)
}

impl From<PlanError> for Failure {
    fn from(error: PlanError) -> Self {
        Failure::new(error.class(), &error)
    }
}
