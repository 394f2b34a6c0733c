//! `mp-train plan`.

use super::args::PlanArgs;
use super::failure::{Failure, FailureClass};
use super::{WHERE_TO_GET_A_MODEL, print};
use crate::config::run::Device;
use crate::plan::{PlanError, PlanOptions};

pub(super) fn run(args: &PlanArgs) -> Result<(), Failure> {
    if args.config.is_bare() && args.size.is_none() {
        let nothing = "no model to plan for: neither --model nor --config nor --size was given";
        return Err(Failure::user(nothing).hint(WHERE_TO_GET_A_MODEL));
    }
    let config = args.resolve()?;
    let device = config.pipeline.devices.first().copied();
    let options = PlanOptions {
        size: args.size,
        sequence_length: args.sequence_length.map(|length| length as usize),
        target_share: args.target_share,
        tflops: args
            .tflops
            .unwrap_or(PlanOptions::usual_tflops(device.unwrap_or(Device::Cpu))),
        link_gbps: args.link_gbps,
    };
    let plan = crate::plan::make(&config, &options)?;
    print(&plan.text)?;
    match plan.no_room {
        None => Ok(()),
        Some(no_room) => Err(Failure::new(FailureClass::User, no_room.as_ref())),
    }
}

impl From<PlanError> for Failure {
    fn from(error: PlanError) -> Self {
        Failure::new(error.class(), &error)
    }
}
