//! `mp-train bench`.

use std::fmt::Write;

use super::args::BenchArgs;
use super::failure::{Failure, FailureClass};
use super::print;
use crate::bench::{self, BenchError, BenchOptions, BenchResult};
use crate::config::raw::AdapterKind;
use crate::config::run::{
    AdapterSection, Device, FullSection, LoraSection, Precision, PrefixSection, ScheduleKind,
};

pub(super) fn run(args: &BenchArgs) -> Result<(), Failure> {
    let result = bench::run(&options(args))?;
    if args.json {
        let line = serde_json::to_string(&result)
            .map_err(|error| Failure::new(FailureClass::Machine, &error))?;
        return print(&format!("{line}\n"));
    }
    print(&describe(&result))
}

fn options(args: &BenchArgs) -> BenchOptions {
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get().min(4_096));
    let on_cpu = args.devices.contains(&Device::Cpu);
    let precision = if on_cpu {
        Precision::F32
    } else {
        Precision::F16
    };
    BenchOptions {
        size: args.size,
        adapter: match args.adapter {
            AdapterKind::Lora => AdapterSection::Lora(LoraSection {
                r: args.r as usize,
                lora_alpha: 32.0,
                lora_dropout: 0.0,
                target_modules: vec!["query_key_value".to_owned()],
                init_adapter: None,
            }),
            AdapterKind::Prefix => AdapterSection::Prefix(PrefixSection {
                pre_seq_len: args.pre_seq_len as usize,
                prefix_projection: false,
                prefix_dropout: 0.0,
                init_adapter: None,
            }),
            AdapterKind::Full => AdapterSection::Full(FullSection::default()),
        },
        devices: args.devices.clone(),
        precision: args.precision.unwrap_or(precision),
        quantization: args.quantization,
        micro_batch_size: args.micro_batch_size as usize,
        sequence_length: args.sequence_length as usize,
        gradient_accumulation: args.gradient_accumulation as usize,
        recompute: args.recompute,
        schedule: args.schedule,
        warm_up: args.warm_up as usize,
        steps: args.steps as usize,
        virtual_stages: match args.schedule {
            ScheduleKind::Interleaved => args.virtual_stages as usize,
            ScheduleKind::OneForwardOneBackward | ScheduleKind::Gpipe => 1,
        },
        transport: args.transport,
        threads: args.threads.map_or_else(cores, |n| n as usize),
    }
}

fn describe(result: &BenchResult) -> String {
    let mut text = String::new();
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    // Writing to a String cannot fail.
    for device in &result.devices {
        let used = match device.used_bytes {
            Some(bytes) => format!(", {:.2} GiB in use", gib(bytes)),
            None => String::new(),
        };
        let _ = writeln!(
            text,
            "device {} ({}): {} blocks, recompute {:?}, {:.2} GiB planned{used}",
            device.device,
            device.name,
            device.blocks,
            device.recompute,
            gib(device.planned_bytes),
        );
    }
    let _ = writeln!(
        text,
        "{:.0} tokens/s, {:.2} TFLOP/s of the model (without recomputation), planned idle {:.1} %, \
         started in {:.1} s, loss {:.3}",
        result.tokens_per_second,
        result.model_tflops,
        100.0 * result.planned_idle,
        result.start_seconds,
        result.last_loss,
    );
    text
}

impl From<BenchError> for Failure {
    fn from(error: BenchError) -> Self {
        Failure::new(error.class(), &error)
    }
}
