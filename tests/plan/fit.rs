//! Blocks dealt out by cost and by fit, recomputation chosen, and the settings that would fit.

use std::time::Duration;

use mp_train::config::model::ModelConfig;
use mp_train::config::model_size::ModelSize;
use mp_train::config::run::{
    AdapterSection, Device, FullSection, LoraSection, Precision, ProductSums, Quantization,
    Recompute, RotaryPrecision, ScheduleKind, TransportKind,
};
use mp_train::data::sampler::MicroBatchSize;
use mp_train::model::trainables::Trainables;
use mp_train::pipeline::advice::{RowLengths, Wish};
use mp_train::pipeline::cost::TypicalBatch;
use mp_train::pipeline::fit::{Demand, Fitted};
use mp_train::pipeline::needs::DeviceMemory;

const GB: u64 = 1_000_000_000;

fn lora() -> AdapterSection {
    AdapterSection::Lora(LoraSection {
        r: 8,
        lora_alpha: 32.0,
        lora_dropout: 0.0,
        target_modules: vec!["query_key_value".to_owned()],
        init_adapter: None,
    })
}

/// ChatGLM-6B with micro-batches of `sequences` rows of 1,024 tokens, half of them targets.
struct Asked {
    model: ModelConfig,
    trainables: Trainables,
    demand: Demand,
    sequences: usize,
}

fn asked(devices: u32, adapter: AdapterSection, sequences: usize) -> Asked {
    let model = ModelSize::ChatGlm6b.config();
    Asked {
        trainables: Trainables::new(&model, &adapter, true).unwrap(),
        model,
        demand: Demand {
            devices: (0..devices).map(Device::Cuda).collect(),
            transport: TransportKind::Auto,
            balance: None,
            precision: Precision::F16,
            rotary_table: RotaryPrecision::Original,
            product_sums: ProductSums::F32,
            schedule: ScheduleKind::OneForwardOneBackward,
            virtual_stages: 1,
            micro_batches: 8,
            recompute: Recompute::Auto,
            threads: 1,
            stall_timeout: Duration::from_secs(120),
            max_rows: sequences * 1024,
            max_sequences: sequences,
            typical: TypicalBatch::new(sequences as f64, 1024.0, 0.5),
        },
        sequences,
    }
}

impl Asked {
    fn memory(&self, bytes: u64) -> Vec<DeviceMemory> {
        DeviceMemory::of(&self.demand.devices, Some(bytes), self.demand.transport).unwrap()
    }

    fn fit(&self, bytes: u64) -> Fitted {
        let memory = self.memory(bytes);
        self.demand
            .fit(&self.model, &self.trainables, &memory)
            .unwrap()
    }

    /// What a stage takes, context and libraries apart.
    fn needs(&self, fitted: &Fitted, rank: usize) -> u64 {
        let bytes = fitted
            .layout
            .bytes(&self.model, &self.trainables, rank, None);
        bytes.total()
    }

    fn blocks(fitted: &Fitted) -> Vec<usize> {
        let stages = fitted.layout.stages.iter();
        stages.map(|stage| stage.num_blocks()).collect()
    }

    fn refused(&self, bytes: u64) -> String {
        let memory = self.memory(bytes);
        let shortage = self.fit(bytes).shortage.unwrap();
        let wish = Wish {
            demand: &self.demand,
            model: &self.model,
            trainables: &self.trainables,
            memory: &memory,
            size: MicroBatchSize::Rows(self.sequences),
            lengths: &RowLengths::uniform(1024),
        };
        wish.refuse(shortage).to_string()
    }
}

#[test]
fn recomputation_is_the_cheapest_that_fits_to_the_byte() {
    let mut asked = asked(1, lora(), 2);
    let own = asked.memory(GB)[0].own;
    let mut last = 0;
    for level in [Recompute::Block, Recompute::AttentionFree, Recompute::None] {
        asked.demand.recompute = level;
        let needed = asked.needs(&asked.fit(80 * GB), 0);
        assert!(needed > last, "{level:?}");
        last = needed;
        asked.demand.recompute = Recompute::Auto;
        let enough = asked.fit(needed + own);
        assert!(enough.shortage.is_none());
        assert_eq!(enough.layout.recompute, [level]);
        let less = asked.fit(needed + own - 1);
        assert_ne!(
            (less.layout.recompute[0], less.shortage.is_none()),
            (level, true)
        );
    }
}

#[test]
fn with_room_for_all_the_costliest_stage_costs_least() {
    // Half of the tokens have a target: the head is worth 1.33 blocks, or less with recomputation.
    for (devices, blocks) in [
        (1, vec![28]),
        (2, vec![15, 13]),
        (3, vec![10, 10, 8]),
        (4, vec![8, 7, 7, 6]),
    ] {
        let asked = asked(devices, lora(), 1);
        let fitted = asked.fit(80 * GB);
        assert_eq!(Asked::blocks(&fitted), blocks);
        assert_eq!(fitted.layout.recompute, vec![Recompute::None; blocks.len()]);
    }
}

#[test]
fn a_stage_that_holds_too_much_gives_blocks_away() {
    // The ends of the model hold a matrix of 1.07 GB each, and the first stage most slots.
    let asked = asked(3, lora(), 4);
    let roomy = asked.fit(80 * GB);
    let most = (0..3).map(|rank| asked.needs(&roomy, rank)).max().unwrap();
    let own = asked.memory(GB)[0].own;
    let tight = asked.fit(most + own - GB);
    assert!(tight.shortage.is_none());
    assert_ne!(
        (Asked::blocks(&tight), &tight.layout.recompute),
        (Asked::blocks(&roomy), &roomy.layout.recompute)
    );
    for rank in 0..3 {
        assert!(asked.needs(&tight, rank) + own <= most + own - GB);
    }
}

#[test]
fn stages_on_one_device_share_its_memory() {
    let mut shared = asked(2, lora(), 1);
    shared.demand.devices = vec![Device::Cuda(0); 2];
    let alone = asked(2, lora(), 1);
    let (two, one) = (shared.memory(24 * GB), alone.memory(24 * GB));
    assert_eq!((two.len(), &two[0].stages[..]), (1, &[0, 1][..]));
    assert_eq!(one.len(), 2);
    // NCCL is for distinct devices.
    assert!(two[0].own < one[0].own);
    let fitted = shared.fit(24 * GB);
    assert!(fitted.shortage.is_none());
    let together = shared.needs(&fitted, 0) + shared.needs(&fitted, 1);
    assert!(together + two[0].own <= 24 * GB);
    let shortage = shared.fit(together / 2).shortage.unwrap();
    assert_eq!((shortage.sharing, shortage.device), (2, Device::Cuda(0)));
}

#[test]
fn nothing_is_refused_for_an_estimate_of_the_system_s_memory() {
    let mut asked = asked(1, AdapterSection::Full(FullSection {}), 64);
    asked.demand.devices = vec![Device::Cpu];
    let memory = DeviceMemory::of(&[Device::Cpu], None, TransportKind::Auto).unwrap();
    assert!(!memory[0].firm);
    let given = DeviceMemory::of(&[Device::Cpu], Some(GB), TransportKind::Auto).unwrap();
    assert!(given[0].firm && given[0].own == 0);
}

#[test]
fn what_is_missing_is_said_with_the_nearest_settings_that_fit() {
    let said = asked(1, lora(), 8).refused(16 * GB);
    println!("{said}");
    for words in [
        "stage 0 on device 0 needs ",
        "are missing; what would fit: micro_batch_size = ",
        "; or rows of at most ",
        "; or quantization = \"int8\"; or quantization = \"int4\"; or 2 devices like these",
    ] {
        assert!(said.contains(words), "{said}");
    }
    // The whole model has 18 bytes per parameter: no setting of micro-batches helps.
    let said = asked(2, AdapterSection::Full(FullSection {}), 1).refused(24 * GB);
    println!("{said}");
    assert!(
        said.contains("what would fit: 6 devices like these"),
        "{said}"
    );
    let said = asked(1, AdapterSection::Full(FullSection {}), 1).refused(2 * GB);
    println!("{said}");
    assert!(said.contains("no setting makes it fit"), "{said}");
}

/// What is advised is the nearest, and fits: the next larger value does not.
#[test]
fn advice_holds_to_the_last_row() {
    let mut asked = asked(1, lora(), 8);
    let said = asked.refused(16 * GB);
    let number = |lead: &str| -> usize {
        let rest = &said[said.find(lead).unwrap() + lead.len()..];
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap();
        digits.parse().unwrap()
    };
    let rows = number("micro_batch_size = ");
    let longest = number("rows of at most ");
    let mut fits = |sequences: usize, tokens: usize| {
        asked.demand.max_rows = sequences * tokens;
        asked.demand.max_sequences = sequences;
        asked.fit(16 * GB).shortage.is_none()
    };
    assert!(fits(rows, 1024) && !fits(rows + 1, 1024));
    assert!(fits(8, longest) && !fits(8, longest + 1));
}

#[test]
fn quantised_weights_take_half_and_a_quarter() {
    let of = |quantization| {
        let mut asked = asked(1, lora(), 1);
        asked.model.quantization = quantization;
        let fitted = asked.fit(80 * GB);
        fitted
            .layout
            .bytes(&asked.model, &asked.trainables, 0, None)
            .weights
    };
    // Design: 12.35, 6.71 and 3.89 GB with embedding and head in one matrix.
    let gb = |quantization| of(quantization) as f64 / GB as f64;
    assert!((gb(Quantization::None) - 12.35).abs() < 0.01);
    assert!((gb(Quantization::Int8) - 6.71).abs() < 0.01);
    assert!((gb(Quantization::Int4) - 3.89).abs() < 0.01);
}
