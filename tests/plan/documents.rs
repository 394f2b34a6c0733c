//! The tables of docs/PLANS.md, by the arithmetic of `mp-train plan`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use mp_train::config::model::ModelConfig;
use mp_train::config::model_size::ModelSize;
use mp_train::config::run::{
    AdapterSection, Device, FullSection, LoraSection, Precision, PrefixSection, ProductSums,
    Quantization, Recompute, RotaryPrecision, ScheduleKind, TransportKind,
};
use mp_train::model::trainables::Trainables;
use mp_train::pipeline::cost::TypicalBatch;
use mp_train::pipeline::fit::{Demand, Fitted};
use mp_train::pipeline::needs::DeviceMemory;

const GB: u64 = 1_000_000_000;

/// Micro-batches to try, the largest first: sequences, and tokens of each.
const BATCHES: [(usize, usize); 10] = [
    (4, 1024),
    (3, 1024),
    (2, 1024),
    (1, 1024),
    (1, 768),
    (1, 512),
    (1, 384),
    (1, 256),
    (1, 128),
    (1, 64),
];

struct Method {
    name: &'static str,
    adapter: AdapterSection,
    quantization: Quantization,
}

fn lora(name: &'static str, quantization: Quantization) -> Method {
    Method {
        name,
        adapter: AdapterSection::Lora(LoraSection {
            r: 8,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: vec!["query_key_value".to_owned()],
            init_adapter: None,
        }),
        quantization,
    }
}

fn prefix(name: &'static str, projection: bool, quantization: Quantization) -> Method {
    Method {
        name,
        adapter: AdapterSection::Prefix(PrefixSection {
            pre_seq_len: 128,
            prefix_projection: projection,
            prefix_dropout: 0.1,
            init_adapter: None,
        }),
        quantization,
    }
}

fn full() -> Method {
    Method {
        name: "whole model, fp16",
        adapter: AdapterSection::Full(FullSection {}),
        quantization: Quantization::None,
    }
}

/// What one run takes.
struct Taken {
    model: ModelConfig,
    trainables: Trainables,
    memory: Vec<DeviceMemory>,
    fitted: Fitted,
}

fn taken(
    method: &Method,
    devices: u32,
    memory: u64,
    (sequences, tokens): (usize, usize),
    recompute: Recompute,
    micro_batches: usize,
) -> Taken {
    let model = ModelConfig {
        quantization: method.quantization,
        ..ModelSize::ChatGlm6b.config()
    };
    let trainables = Trainables::new(&model, &method.adapter, true).unwrap();
    let demand = Demand {
        devices: (0..devices).map(Device::Cuda).collect(),
        transport: TransportKind::Auto,
        balance: None,
        precision: Precision::F16,
        rotary_table: RotaryPrecision::Original,
        product_sums: ProductSums::F32,
        schedule: ScheduleKind::OneForwardOneBackward,
        virtual_stages: 1,
        micro_batches,
        recompute,
        threads: 1,
        stall_timeout: Duration::from_secs(120),
        max_rows: sequences * tokens,
        max_sequences: sequences,
        typical: TypicalBatch::new(sequences as f64, tokens as f64, 0.5),
    };
    let memory = DeviceMemory::of(&demand.devices, Some(memory), demand.transport).unwrap();
    let fitted = demand.fit_or_nearly(&model, &trainables, &memory).unwrap();
    Taken {
        model,
        trainables,
        memory,
        fitted,
    }
}

impl Taken {
    /// Bytes of each device, context and libraries included.
    fn bytes(&self) -> Vec<u64> {
        let layout = &self.fitted.layout;
        let stage = |rank: usize| {
            let bytes = layout.bytes(&self.model, &self.trainables, rank, None);
            bytes.total() + self.memory[rank].own
        };
        (0..layout.stages.len()).map(stage).collect()
    }

    /// `9 + 10 + 9`, or what `show` makes of each device.
    fn joined(&self, show: impl Fn(usize) -> String) -> String {
        let stages = 0..self.fitted.layout.stages.len();
        stages.map(show).collect::<Vec<_>>().join(" + ")
    }

    fn blocks(&self) -> String {
        self.joined(|rank| self.fitted.layout.stages[rank].num_blocks().to_string())
    }

    fn gigabytes(&self) -> String {
        let bytes = self.bytes();
        self.joined(|rank| format!("{:.1}", bytes[rank] as f64 / GB as f64))
    }

    fn recompute(&self) -> String {
        let name = |level: &Recompute| match level {
            Recompute::None => "none",
            Recompute::AttentionFree => "attention_free",
            Recompute::Block => "block",
            Recompute::Auto => "auto",
        };
        let levels: Vec<&str> = self.fitted.layout.recompute.iter().map(name).collect();
        match levels.windows(2).all(|pair| pair[0] == pair[1]) {
            true => levels[0].to_owned(),
            false => levels.join(", "),
        }
    }
}

fn table(devices: u32, gigabytes: u64, methods: &[Method]) -> String {
    let mut text = format!(
        "### {devices} x {gigabytes} GB\n\n\
         | run | micro-batch | blocks | recompute | GB of each device |\n| --- | --- | --- | --- | --- |\n"
    );
    for method in methods {
        let runs = BATCHES.map(|batch| {
            let memory = gigabytes * GB;
            (
                batch,
                taken(method, devices, memory, batch, Recompute::Auto, 8),
            )
        });
        let fits = |(_, taken): &&((usize, usize), Taken)| taken.fitted.shortage.is_none();
        let name = method.name;
        let _ = match runs.iter().find(fits) {
            Some(((sequences, tokens), taken)) => writeln!(
                text,
                "| {name} | {sequences} x {tokens} | {} | {} | {} |",
                taken.blocks(),
                taken.recompute(),
                taken.gigabytes(),
            ),
            None => {
                let (_, taken) = runs.last().unwrap();
                writeln!(
                    text,
                    "| {name} | does not fit | {} | {} | {} needed for 1 x 64 |",
                    taken.blocks(),
                    taken.recompute(),
                    taken.gigabytes(),
                )
            }
        };
    }
    text + "\n"
}

/// What others measured beside what is planned here.
fn anchors() -> String {
    let fp16 = lora("", Quantization::None);
    let int4 = prefix("", false, Quantization::Int4);
    let mut text = String::from(
        "| run | elsewhere | planned here, recompute = none | block |\n| --- | --- | --- | --- |\n",
    );
    for (name, elsewhere, method, devices, batch) in [
        (
            "LoRA fp16, 1 x 512",
            "15.2 GB (zero_nlp, recomputing)",
            &fp16,
            1,
            (1, 512),
        ),
        (
            "LoRA fp16, 4 x 1024, one card",
            "23 GB (zero_nlp)",
            &fp16,
            1,
            (4, 1024),
        ),
        (
            "LoRA fp16, 4 x 1024, two cards",
            "8 + 11 GB (zero_nlp)",
            &fp16,
            2,
            (4, 1024),
        ),
        (
            "P-Tuning v2 int4, 1 x 64 + 64",
            "6.7 GB (THUDM)",
            &int4,
            1,
            (1, 128),
        ),
    ] {
        let planned = |recompute| {
            // One micro-batch after the other, as the others do it, so that none waits in a slot.
            let taken = taken(method, devices, 80 * GB, batch, recompute, 1);
            taken.gigabytes()
        };
        let (none, block) = (planned(Recompute::None), planned(Recompute::Block));
        let _ = writeln!(text, "| {name} | {elsewhere} | {none} | {block} |");
    }
    text + "\n"
}

fn tables() -> String {
    use Quantization::{Int4, Int8, None};
    let adapters = [
        lora("LoRA, fp16", None),
        lora("LoRA, int8", Int8),
        lora("LoRA, int4", Int4),
        prefix("P-Tuning v2, fp16", false, None),
        prefix("P-Tuning v2, int4", false, Int4),
        prefix("P-Tuning v2 with projection, fp16", true, None),
        prefix("P-Tuning v2 with projection, int4", true, Int4),
    ];
    let mut text = String::from("\n");
    for (devices, gigabytes) in [(1, 24), (2, 16), (3, 24), (4, 24)] {
        text += &table(devices, gigabytes, &adapters);
    }
    for (devices, gigabytes) in [(4, 24), (6, 24), (2, 80)] {
        text += &table(devices, gigabytes, &[full()]).replace("GB\n\n|", "GB, whole model\n\n|");
    }
    text + "### Beside what others measured\n\n" + &anchors()
}

/// `UPDATE_SNAPSHOTS=1` writes the tables anew.
#[test]
fn the_page_of_plans_is_up_to_date() {
    const MARKS: [&str; 2] = ["<!-- tables -->\n", "<!-- end of tables -->\n"];
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/PLANS.md");
    let page = fs::read_to_string(&path).unwrap();
    let start = page.find(MARKS[0]).unwrap() + MARKS[0].len();
    let end = page.find(MARKS[1]).unwrap();
    let tables = tables();
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&path, [&page[..start], &tables, &page[end..]].concat()).unwrap();
        return;
    }
    let note = "the page is not up to date; UPDATE_SNAPSHOTS=1 writes it anew";
    for (found, expected) in page[start..end].lines().zip(tables.lines()) {
        assert_eq!(found, expected, "{note}");
    }
    assert_eq!(&page[start..end], tables, "{note}");
}
