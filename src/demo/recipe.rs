//! The settings of the three runs. Found by trying; fewer steps make the tuning unreliable.

use std::path::PathBuf;

use super::DemoOptions;
use super::files::Folder;
use crate::config::run::{
    AdapterSection, DataSection, Device, FullSection, LoraSection, LossNormalisation, LrSchedule,
    ModelSection, OptimizerSection, PipelineSection, Precision, PrefixSection, ProductSums,
    Quantization, Recompute, Resume, RotaryPrecision, RunConfig, RunSection, STALL_TIMEOUT,
    ScheduleKind, TransportKind,
};

/// The three runs, each behind the one before it.
pub struct Recipe {
    /// The whole model, on one CPU stage.
    pub base: RunConfig,
    /// LoRA on the trained base, over two CPU stages.
    pub lora: RunConfig,
    /// P-Tuning v2 on the trained base, over two CPU stages.
    pub prefix: RunConfig,
}

/// Devices that base and adapters are trained and asked on.
pub const ONE_STAGE: &[Device] = &[Device::Cpu];
/// As [`ONE_STAGE`], for the adapters.
pub const TWO_STAGES: &[Device] = &[Device::Cpu, Device::Cpu];

/// What differs from run to run.
struct Run {
    adapter: AdapterSection,
    model: PathBuf,
    rows: PathBuf,
    output: PathBuf,
    devices: &'static [Device],
    max_steps: u64,
    learning_rate: f64,
    warmup_steps: u64,
    micro_batch_size: usize,
    gradient_accumulation: usize,
}

impl Recipe {
    /// The runs of a demo in `folder`.
    pub fn new(folder: &Folder, options: &DemoOptions) -> Self {
        let lora = LoraSection {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: vec!["query_key_value".to_owned()],
            init_adapter: None,
        };
        let prefix = PrefixSection {
            pre_seq_len: 16,
            prefix_projection: false,
            prefix_dropout: 0.0,
            init_adapter: None,
        };
        let base = Run {
            adapter: AdapterSection::Full(FullSection {}),
            model: folder.untrained(),
            rows: folder.file("base.jsonl"),
            output: folder.base(),
            devices: ONE_STAGE,
            max_steps: 500,
            learning_rate: 3e-3,
            warmup_steps: 50,
            micro_batch_size: 32,
            gradient_accumulation: 1,
        };
        let tuning = |adapter, output, learning_rate, max_steps| Run {
            adapter,
            model: folder.base_model(),
            rows: folder.file("tuning.jsonl"),
            output,
            devices: TWO_STAGES,
            max_steps,
            learning_rate,
            warmup_steps: 0,
            micro_batch_size: 8,
            gradient_accumulation: 4,
        };
        let lora = tuning(AdapterSection::Lora(lora), folder.lora(), 5e-3, 120);
        let prefix = tuning(AdapterSection::Prefix(prefix), folder.prefix(), 1e-1, 200);
        Recipe {
            base: base.config(options),
            lora: lora.config(options),
            prefix: prefix.config(options),
        }
    }
}

impl Run {
    fn config(self, options: &DemoOptions) -> RunConfig {
        RunConfig {
            model: ModelSection {
                path: self.model,
                precision: Precision::F32,
                quantization: Quantization::None,
                rotary_table: RotaryPrecision::F32,
                product_sums: ProductSums::F32,
            },
            adapter: self.adapter,
            data: DataSection::token_ids(self.rows, true),
            optimizer: OptimizerSection {
                learning_rate: self.learning_rate,
                lr_schedule: LrSchedule::Linear,
                warmup_steps: self.warmup_steps,
                weight_decay: 0.0,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                max_grad_norm: 1.0,
                loss_normalisation: LossNormalisation::PerToken,
                initial_loss_scale: 65_536.0,
                max_skipped_steps: 20,
            },
            pipeline: PipelineSection {
                devices: self.devices.to_vec(),
                balance: None,
                schedule: ScheduleKind::OneForwardOneBackward,
                virtual_stages: 1,
                recompute: Recompute::None,
                threads: options.threads,
                memory_per_device: None,
                transport: TransportKind::Auto,
                stall_timeout: STALL_TIMEOUT,
            },
            run: RunSection {
                output: self.output,
                max_steps: Some(self.max_steps),
                epochs: None,
                micro_batch_size: self.micro_batch_size,
                micro_batch_tokens: None,
                gradient_accumulation: self.gradient_accumulation,
                save_steps: 0,
                save_total_limit: 1,
                seed: options.seed,
                resume: Resume::No,
                eval_steps: 0,
                log_steps: 50,
            },
        }
    }
}
