//! `mp-train bench`.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use super::args::{BenchArgs, LengthsWord};
use super::failure::{Failure, FailureClass};
use super::print;
use crate::bench::{
    self, BenchError, BenchOptions, BenchResult, LayoutChoice, LayoutResult, LayoutWord, Lengths,
    MeasuredAs, Measurement, Picture, Watcher, schedule_name,
};
use crate::config::byte_size::ByteSize;
use crate::config::raw::AdapterKind;
use crate::config::run::{
    AdapterSection, Device, FullSection, LoraSection, Precision, PrefixSection, ProductSums,
    ScheduleKind,
};
use crate::report::atomic_file::AtomicFile;
use crate::report::timeline::{chrome_trace, svg};

const ON_CPU: &str = "`mp-train bench --size small --devices cpu` measures the CPU";

pub(super) fn run(args: &BenchArgs) -> Result<(), Failure> {
    let options = options(args)?;
    let mut files = Files {
        args,
        problem: None,
    };
    let result = bench::run(&options, args.commit.clone(), &mut files)?;
    if let Some(problem) = files.problem {
        return Err(problem);
    }
    let line = serde_json::to_string(&result)
        .map_err(|error| Failure::new(FailureClass::Machine, &error))?;
    if let Some(path) = &args.output {
        write(path, &format!("{line}\n"))?;
    }
    match args.json {
        true => print(&format!("{line}\n"))?,
        false => print(&describe(&result))?,
    }
    let mut failures = result
        .layouts
        .iter()
        .filter_map(|layout| layout.failure.as_ref());
    match failures.next() {
        None => Ok(()),
        Some(first) => {
            let count = 1 + failures.count();
            let of = result.layouts.len();
            let message = format!("{count} of {of} layouts could not be measured");
            Err(Failure::of_class(first.class, message))
        }
    }
}

/// Shows how far it is, and writes the pictures.
struct Files<'a> {
    args: &'a BenchArgs,
    problem: Option<Failure>,
}

impl Watcher for Files<'_> {
    fn begins(&mut self, index: usize, count: usize, layout: &LayoutChoice) {
        if count > 1 {
            // Nobody is left to tell when standard error is closed.
            let _ = writeln!(
                std::io::stderr(),
                "layout {} of {count}: {layout}",
                index + 1
            );
        }
    }

    fn profiled(&mut self, _index: usize, count: usize, picture: Picture) {
        let files = [
            (&self.args.timeline, svg as fn(&_) -> String),
            (&self.args.trace, chrome_trace),
        ];
        for (path, draw) in files {
            let Some(path) = path else { continue };
            let path = match count {
                1 => path.clone(),
                _ => path_of(path, &picture.layout),
            };
            if let Err(problem) = write(&path, &draw(&picture.timeline)) {
                self.problem.get_or_insert(problem);
            }
        }
    }
}

/// `step.svg` of a layout: `step.2-gpipe-8.svg`.
fn path_of(path: &Path, layout: &LayoutChoice) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!(
        ".{}-{}",
        layout.stages,
        schedule_name(layout.schedule)
    ));
    if layout.virtual_stages > 1 {
        name.push(layout.virtual_stages.to_string());
    }
    name.push(format!("-{}", layout.micro_batches));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let write = || {
        let mut file = AtomicFile::create(path)?;
        file.write_all(text.as_bytes())?;
        file.commit()
    };
    write().map_err(|error: std::io::Error| {
        let message = format!("cannot write {}: {error}", path.display());
        let user = [
            std::io::ErrorKind::NotFound,
            std::io::ErrorKind::PermissionDenied,
            std::io::ErrorKind::InvalidInput,
            std::io::ErrorKind::IsADirectory,
        ];
        match user.contains(&error.kind()) {
            true => Failure::user(message),
            false => Failure::of_class(FailureClass::Machine, message),
        }
    })
}

fn options(args: &BenchArgs) -> Result<BenchOptions, Failure> {
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get().min(4_096));
    let on_cpu = args.devices.contains(&Device::Cpu);
    let precision = if on_cpu {
        Precision::F32
    } else {
        Precision::F16
    };
    if args.profile_steps == 0 && (args.timeline.is_some() || args.trace.is_some()) {
        return Err(Failure::user(
            "--timeline and --trace show a profiled step, and --profile-steps 0 asks for none",
        ));
    }
    let frozen_on_gpus = !on_cpu && args.adapter != AdapterKind::Full;
    if args.product_sums == ProductSums::F16 && !frozen_on_gpus {
        return Err(Failure::user(
            "--product-sums f16 is for frozen weights on GPUs: leave it out with --devices cpu and with \
             --adapter full",
        ));
    }
    // Sooner than after all has been measured.
    for path in [&args.output, &args.timeline, &args.trace]
        .into_iter()
        .flatten()
    {
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        if path.is_dir() || folder.is_some_and(|folder| !folder.is_dir()) {
            return Err(Failure::user(format!(
                "cannot write {}: its folder must exist, and it must be no folder itself",
                path.display()
            )));
        }
    }
    Ok(BenchOptions {
        size: args.size,
        adapter: adapter(args),
        devices: args.devices.clone(),
        layouts: layouts(args),
        precision: args.precision.unwrap_or(precision),
        quantization: args.quantization,
        product_sums: args.product_sums,
        micro_batch_size: args.micro_batch_size as usize,
        lengths: lengths(args)?,
        recompute: args.recompute,
        warm_up: args.warm_up as usize,
        steps: args.steps as usize,
        profile_steps: args.profile_steps as usize,
        transport: args.transport,
        threads: args.threads.map_or_else(cores, |n| n as usize),
    })
}

fn adapter(args: &BenchArgs) -> AdapterSection {
    match args.adapter {
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
    }
}

fn lengths(args: &BenchArgs) -> Result<Lengths, Failure> {
    let given = args.sequence_length.map(|length| length as usize);
    let longest = given.unwrap_or(512);
    match &args.lengths {
        None => Ok(Lengths::Listed {
            tokens: vec![longest],
        }),
        Some(LengthsWord::Mixed) => Ok(Lengths::Mixed { longest }),
        Some(LengthsWord::Listed(_)) if given.is_some() => Err(Failure::user(
            "--lengths names the length of every row, and --sequence-length one for all: give one of \
             them (both go together with --lengths mixed, whose longest row it is)",
        )),
        Some(LengthsWord::Listed(tokens)) => Ok(Lengths::Listed {
            tokens: tokens.clone(),
        }),
    }
}

fn layouts(args: &BenchArgs) -> Vec<LayoutChoice> {
    let virtual_stages = |schedule, parts: Option<usize>| match schedule {
        ScheduleKind::Interleaved => parts.unwrap_or(args.virtual_stages as usize),
        ScheduleKind::OneForwardOneBackward | ScheduleKind::Gpipe => 1,
    };
    let micro_batches = args.gradient_accumulation as usize;
    let Some(words) = &args.layouts else {
        return vec![LayoutChoice {
            stages: args.devices.len(),
            schedule: args.schedule,
            virtual_stages: virtual_stages(args.schedule, None),
            micro_batches,
        }];
    };
    let mut all: Vec<LayoutChoice> = Vec::new();
    for word in words {
        let named = match *word {
            LayoutWord::Auto => {
                let blocks = args.size.config().num_layers;
                LayoutChoice::all(args.devices.len(), blocks, micro_batches)
            }
            LayoutWord::One {
                stages,
                schedule,
                micro_batches: count,
            } => {
                let (schedule, parts) = schedule.unwrap_or((args.schedule, None));
                vec![LayoutChoice {
                    stages,
                    schedule,
                    virtual_stages: virtual_stages(schedule, parts),
                    micro_batches: count.unwrap_or(micro_batches),
                }]
            }
        };
        for layout in named {
            if !all.contains(&layout) {
                all.push(layout);
            }
        }
    }
    all
}

/// Tables for a person.
fn describe(result: &BenchResult) -> String {
    let mut text = title(result);
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "\n{:<6} {:<15} {:>3} {:>9} {:>9} {:>6} {:>9} {:>17} {:>7} {:>7} {:>7} {:>7} {:>9} {:>9}",
        "stages",
        "schedule",
        "m",
        "tokens/s",
        "samples/s",
        "ideal",
        "step s",
        "min to max",
        "MFU",
        "sheet",
        "bubble",
        "formula",
        "planned",
        "peak",
    );
    let alone = result.layouts.iter().find_map(|layout| {
        let measured = layout.measured.as_ref()?;
        Some(measured.tokens_per_second / layout.layout.stages as f64)
    });
    for layout in &result.layouts {
        let choice = &layout.layout;
        let name = match choice.virtual_stages {
            1 => schedule_name(choice.schedule).to_owned(),
            parts => format!("{} x {parts}", schedule_name(choice.schedule)),
        };
        let _ = write!(
            text,
            "{:<6} {name:<15} {:>3} ",
            choice.stages, choice.micro_batches
        );
        text.push_str(&match (&layout.measured, &layout.failure) {
            (Some(measured), _) => row(measured, choice.stages, alone),
            (None, Some(failure)) => format!("not measured: {}", failure.reason),
            (None, None) => String::new(),
        });
        text.push('\n');
    }
    text.push_str(&kinds_of_work(&result.layouts));
    text.push_str(&memory(&result.layouts));
    text.push_str(LEGEND);
    text
}

const LEGEND: &str = "
m: micro-batches of a step. ideal: tokens/s over those of the first layout, per stage. MFU: operations of
the products that a step needs (lm_head on rows with a target, visible pairs of attention, no recomputation)
over what the devices' matrix products reached above; sheet: over what their data sheets promise. bubble:
measured share of stage time without an action; formula: (p - 1) / (v m + p - 1).
";

fn title(result: &BenchResult) -> String {
    let options = &result.options;
    let mut text = format!(
        "{}, {}, {}; ",
        options.size.name(),
        match &options.adapter {
            AdapterSection::Lora(lora) => format!("LoRA r = {}", lora.r),
            AdapterSection::Prefix(prefix) => format!("prefix of {}", prefix.pre_seq_len),
            AdapterSection::Full(_) => "whole model".to_owned(),
        },
        match options.precision {
            Precision::F32 => "f32",
            Precision::F16 => "f16",
        },
    );
    if options.product_sums == ProductSums::F16 {
        text.insert_str(text.len() - 2, ", products summed in f16");
    }
    let rows = options.micro_batch_size;
    let plural = if rows == 1 { "" } else { "s" };
    let (shortest, longest) = options.lengths.range();
    let _ = write!(text, "micro-batches of {rows} row{plural} of ");
    let _ = match &options.lengths {
        Lengths::Mixed { .. } => writeln!(text, "mixed lengths, at most {longest} tokens"),
        Lengths::Listed { .. } if shortest == longest => writeln!(text, "{longest} tokens"),
        Lengths::Listed { .. } => writeln!(text, "{shortest} to {longest} tokens"),
    };
    let machine = &result.machine;
    let _ = writeln!(
        text,
        "{}, {} cores{}",
        machine.cpu.as_deref().unwrap_or("processor unknown"),
        machine.cores,
        match &machine.driver {
            Some(driver) => format!(", GPU driver {driver}"),
            None => String::new(),
        }
    );
    for rate in &result.matmul {
        let [rows, inner, columns] = rate.shape;
        let sheet = match rate.data_sheet_tflops {
            Some(tflops) => format!(", {tflops} by its data sheet"),
            None => String::new(),
        };
        let _ = writeln!(
            text,
            "device {} ({}): {:.3} TFLOP/s in a product of {rows} x {inner} x {columns}{sheet}",
            rate.device, rate.name, rate.tflops
        );
    }
    text
}

fn row(measured: &Measurement, stages: usize, alone: Option<f64>) -> String {
    let percent = |share: f64| format!("{:.1}%", 100.0 * share);
    let optional = |share: Option<f64>| share.map_or("-".to_owned(), percent);
    let ideal = alone.map_or(f64::NAN, |alone| {
        measured.tokens_per_second / (alone * stages as f64)
    });
    let step = &measured.step_seconds;
    let planned: Option<u64> = measured.memory.iter().map(|of| of.planned_bytes).max();
    let peak: Option<u64> = measured.memory.iter().filter_map(|of| of.peak_bytes).max();
    let size = |bytes: Option<u64>| bytes.map_or("-".to_owned(), |n| ByteSize(n).to_string());
    format!(
        "{:>9.1} {:>9.3} {:>6.2} {:>9.4} {:>17} {:>7} {:>7} {:>7} {:>7} {:>9} {:>9}",
        measured.tokens_per_second,
        measured.samples_per_second,
        ideal,
        step.median,
        format!("{:.4} to {:.4}", step.min, step.max),
        percent(measured.mfu.of_measured_matmul),
        optional(measured.mfu.of_data_sheet),
        optional(measured.profile.as_ref().map(|profile| profile.bubble)),
        percent(measured.bubble_by_formula),
        size(planned),
        size(peak),
    )
}

/// Each layout's start, and where the time of its stages went; and what the simulator says to it.
fn kinds_of_work(layouts: &[LayoutResult]) -> String {
    let mut text = String::new();
    for layout in layouts {
        let Some(measured) = &layout.measured else {
            continue;
        };
        let (start, loss) = (measured.start_seconds, measured.last_loss);
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\n{}: started in {start:.1} s, loss {loss:.3}",
            layout.layout
        );
        if !measured.transport.is_empty() {
            let _ = write!(text, ", over {}", measured.transport);
        }
        text.push('\n');
        let Some(profile) = &measured.profile else {
            continue;
        };
        let seconds = profile.step_seconds.median;
        let _ = write!(text, "  profiled step {seconds:.4} s");
        if let Some(predicted) = &profile.prediction {
            let _ = write!(
                text,
                ", predicted from its actions {:.4} s ({:+.1} %)",
                predicted.step_seconds,
                100.0 * (predicted.step_seconds / seconds - 1.0),
            );
        }
        text.push('\n');
        let _ = writeln!(
            text,
            "  {:<12} {:>9} {:>9} {:>11} {:>9} {:>9} {:>13} {:>9} {:>9}",
            "stage",
            "products",
            "attention",
            "elementwise",
            "loss",
            "optimiser",
            "communication",
            "waiting",
            "other"
        );
        for (rank, work) in profile.work_seconds.iter().enumerate() {
            let share = |seconds: f64| format!("{:.1}%", 100.0 * seconds / work.total());
            let device = layout.devices.get(rank).map(ToString::to_string);
            let _ = writeln!(
                text,
                "  {:<12} {:>9} {:>9} {:>11} {:>9} {:>9} {:>13} {:>9} {:>9}",
                format!("{rank} on {}", device.unwrap_or_default()),
                share(work.products),
                share(work.attention),
                share(work.elementwise),
                share(work.loss),
                share(work.optimizer),
                share(work.communication),
                share(work.waiting),
                share(work.other),
            );
        }
    }
    text
}

/// How the peak was seen; alike for all layouts of a run but for the devices.
fn memory(layouts: &[LayoutResult]) -> String {
    let measured = layouts.iter().filter_map(|layout| layout.measured.as_ref());
    let first = measured.flat_map(|measured| &measured.memory).next();
    let how = match first.map(|memory| memory.measured_as) {
        None => return String::new(),
        Some(MeasuredAs::ResidentRise) => {
            "rise of the process's resident memory, all stages together"
        }
        Some(MeasuredAs::GpuRiseByNvidiaSmi) => {
            "rise of the GPU's used memory by nvidia-smi, context and libraries included"
        }
        Some(MeasuredAs::GpuRiseByCuda) => {
            "rise of the GPU's used memory by CUDA, libraries included, the bare context not"
        }
    };
    format!("\nplanned, peak: of the device that has most. peak: {how}.")
}

impl From<BenchError> for Failure {
    fn from(error: BenchError) -> Self {
        let failure = Failure::new(error.class(), &error);
        match error.is_without_gpu() {
            true => failure.hint(ON_CPU),
            false => failure,
        }
    }
}
