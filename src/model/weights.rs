//! The only table of checkpoint names: which tensors a ChatGLM-6B model has, and their shapes.

use super::{ModelError, quantised};
use crate::checkpoint::pieces::same_tensor;
use crate::checkpoint::{Dtype, TensorInfo, TensorSource};
use crate::config::model::ModelConfig;

/// `[V, H]`.
pub const WORD_EMBEDDINGS: &str = "transformer.word_embeddings.weight";
/// `[V, H]`; may be absent, or equal to the embedding, or shared with it.
pub const LM_HEAD: &str = "lm_head.weight";
/// Final norm, without `.weight` and `.bias`.
pub const FINAL_NORM: &str = "transformer.final_layernorm";

/// A linear layer of a block, by the last part of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinearSite {
    /// `attention.query_key_value`, `[3 H, H]`.
    QueryKeyValue,
    /// `attention.dense`, `[H, H]`.
    Dense,
    /// `mlp.dense_h_to_4h`, `[F, H]`.
    HTo4h,
    /// `mlp.dense_4h_to_h`, `[H, F]`.
    FourHToH,
}

impl LinearSite {
    /// All of them, in the order of the forward pass.
    pub const ALL: [LinearSite; 4] = [
        LinearSite::QueryKeyValue,
        LinearSite::Dense,
        LinearSite::HTo4h,
        LinearSite::FourHToH,
    ];

    /// The name by which `target_modules` asks for it.
    pub fn target(self) -> &'static str {
        match self {
            LinearSite::QueryKeyValue => "query_key_value",
            LinearSite::Dense => "dense",
            LinearSite::HTo4h => "dense_h_to_4h",
            LinearSite::FourHToH => "dense_4h_to_h",
        }
    }

    /// Module name in a checkpoint, without `.weight` and `.bias`.
    pub fn module(self, layer: usize) -> String {
        let part = match self {
            LinearSite::QueryKeyValue | LinearSite::Dense => "attention",
            LinearSite::HTo4h | LinearSite::FourHToH => "mlp",
        };
        format!("transformer.layers.{layer}.{part}.{}", self.target())
    }

    /// (in_features, out_features).
    pub fn features(self, config: &ModelConfig) -> (usize, usize) {
        let (hidden, inner) = (config.hidden_size, config.inner_hidden_size);
        match self {
            LinearSite::QueryKeyValue => (hidden, 3 * hidden),
            LinearSite::Dense => (hidden, hidden),
            LinearSite::HTo4h => (hidden, inner),
            LinearSite::FourHToH => (inner, hidden),
        }
    }
}

/// A norm of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormSite {
    /// `input_layernorm`.
    Input,
    /// `post_attention_layernorm`.
    PostAttention,
}

impl NormSite {
    /// Module name in a checkpoint, without `.weight` and `.bias`.
    pub fn module(self, layer: usize) -> String {
        let name = match self {
            NormSite::Input => "input_layernorm",
            NormSite::PostAttention => "post_attention_layernorm",
        };
        format!("transformer.layers.{layer}.{name}")
    }
}

/// Name and shape of a tensor.
pub type NamedShape = (String, Vec<usize>);

/// The tensors of block `layer`, in the order of the forward pass.
pub fn block_tensors(config: &ModelConfig, layer: usize) -> Vec<NamedShape> {
    let norm = |site: NormSite| {
        ["weight", "bias"].map(|kind| {
            let name = format!("{}.{kind}", site.module(layer));
            (name, vec![config.hidden_size])
        })
    };
    let linear = |site: LinearSite| {
        let (in_features, out_features) = site.features(config);
        let module = site.module(layer);
        [
            (format!("{module}.weight"), vec![out_features, in_features]),
            (format!("{module}.bias"), vec![out_features]),
        ]
    };
    let mut tensors = Vec::new();
    tensors.extend(norm(NormSite::Input));
    tensors.extend(linear(LinearSite::QueryKeyValue));
    tensors.extend(linear(LinearSite::Dense));
    tensors.extend(norm(NormSite::PostAttention));
    tensors.extend(linear(LinearSite::HTo4h));
    tensors.extend(linear(LinearSite::FourHToH));
    tensors
}

/// Name of the scales beside a weight that is stored as codes.
pub fn scale_name(weight: &str) -> String {
    format!("{weight}_scale")
}

/// All tensors of a model, lm_head included, in the order of the forward pass.
pub fn model_tensors(config: &ModelConfig) -> Vec<NamedShape> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let mut tensors = vec![(WORD_EMBEDDINGS.to_owned(), vec![vocab, hidden])];
    for layer in 0..config.num_layers {
        tensors.extend(block_tensors(config, layer));
    }
    tensors.push((format!("{FINAL_NORM}.weight"), vec![hidden]));
    tensors.push((format!("{FINAL_NORM}.bias"), vec![hidden]));
    tensors.push((LM_HEAD.to_owned(), vec![vocab, hidden]));
    tensors
}

/// A buffer that original checkpoints carry and the original ignores on loading: so does the engine.
fn is_ignored(name: &str) -> bool {
    name.starts_with("transformer.layers.") && name.ends_with(".rotary_emb.inv_freq")
}

/// Where embedding and head come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadSource {
    /// Tensor that the embedding is read from.
    pub embedding: &'static str,
    /// Tensor that lm_head is read from.
    pub head: &'static str,
    /// Whether the model says that they are one matrix.
    pub tied: bool,
    /// Something the user should know.
    pub warning: Option<String>,
}

/// A tensor as the files hold it.
struct Stored {
    name: String,
    shape: Vec<usize>,
    /// Whether its elements are codes.
    codes: bool,
}

/// What the files of a model hold when its linear layers are as `config.quantization` says.
fn stored_tensors(config: &ModelConfig) -> Vec<Stored> {
    let plain = |(name, shape)| Stored {
        name,
        shape,
        codes: false,
    };
    let Some(bits) = quantised::bits(config.quantization) else {
        return model_tensors(config).into_iter().map(plain).collect();
    };
    let mut stored = Vec::new();
    for (name, shape) in model_tensors(config) {
        match shape[..] {
            [rows, cols] if name != WORD_EMBEDDINGS && name != LM_HEAD => {
                stored.push(plain((scale_name(&name), vec![rows])));
                stored.push(Stored {
                    name,
                    shape: vec![rows, bits.row_bytes(cols)],
                    codes: true,
                });
            }
            _ => stored.push(plain((name, shape))),
        }
    }
    stored
}

/// Refuses codes where numbers should be, the other way round, and integers that are neither.
fn check_elements(expected: &Stored, info: &TensorInfo) -> Result<(), ModelError> {
    let fits = match expected.codes {
        true => info.dtype == Dtype::I8,
        false => info.dtype.is_float(),
    };
    if fits {
        return Ok(());
    }
    Err(ModelError::WrongElements {
        file: info.file.clone(),
        name: expected.name.clone(),
        found: info.dtype,
        expected: match expected.codes {
            true => "gives a quantization_bit, so that it should be I8",
            false => "gives no quantization_bit for it, so that it should be F16",
        },
    })
}

/// Checks names, shapes and codes of a model folder against its configuration, whose `quantization` is
/// that of the folder.
///
/// # Errors
/// A missing, extra or misshapen tensor, by name; reading fails.
pub fn check(source: &dyn TensorSource, config: &ModelConfig) -> Result<HeadSource, ModelError> {
    let expected = stored_tensors(config);
    let mut missing = Vec::new();
    for tensor in &expected {
        let Stored { name, shape, .. } = tensor;
        let info = source.info(name);
        if let Some(info) = &info {
            check_elements(tensor, info)?;
        }
        match info {
            Some(info) if info.shape == *shape => {}
            Some(info) => {
                return Err(ModelError::WrongShape {
                    file: info.file,
                    name: name.clone(),
                    found: info.shape,
                    expected: shape.clone(),
                });
            }
            None if name == LM_HEAD || name == WORD_EMBEDDINGS => {}
            None => missing.push(name.clone()),
        }
    }
    let has = |name| source.info(name).is_some();
    let (embedding, head) = (has(WORD_EMBEDDINGS), has(LM_HEAD));
    if !(embedding || head && config.tie_word_embeddings) {
        missing.insert(0, WORD_EMBEDDINGS.to_owned());
    }
    if let Some(name) = missing.first() {
        return Err(ModelError::MissingTensor {
            name: name.clone(),
            count: missing.len(),
        });
    }
    let names = source.names();
    let extra: Vec<&String> = names
        .iter()
        .filter(|name| !is_ignored(name) && !expected.iter().any(|known| known.name == **name))
        .collect();
    if let Some(name) = extra.first() {
        return Err(ModelError::ExtraTensor {
            file: source.info(name).map(|info| info.file).unwrap_or_default(),
            name: (*name).clone(),
            count: extra.len(),
        });
    }
    head_source(source, config, embedding, head)
}

/// Decides which matrix the embedding and the head are.
fn head_source(
    source: &dyn TensorSource,
    config: &ModelConfig,
    embedding: bool,
    head: bool,
) -> Result<HeadSource, ModelError> {
    let both = |name, warning| HeadSource {
        embedding: name,
        head: name,
        tied: true,
        warning,
    };
    Ok(match (embedding, head) {
        (true, false) if config.tie_word_embeddings => both(WORD_EMBEDDINGS, None),
        (true, false) => both(
            WORD_EMBEDDINGS,
            Some(format!(
                "`{LM_HEAD}` is absent although config.json says tie_word_embeddings = false; \
                 the embedding is used for both"
            )),
        ),
        (false, _) => both(LM_HEAD, None),
        (true, true) if config.tie_word_embeddings => {
            // Hugging Face's loader shares the matrices and reads lm_head last, so that it wins.
            let differ = !same_tensor(source, WORD_EMBEDDINGS, LM_HEAD)?;
            let warning = format!(
                "`{WORD_EMBEDDINGS}` and `{LM_HEAD}` differ although config.json ties them (its \
                 default); `{LM_HEAD}` is used for both, as Hugging Face does. Set \
                 \"tie_word_embeddings\": false in config.json if they are meant to differ"
            );
            both(LM_HEAD, differ.then_some(warning))
        }
        (true, true) => HeadSource {
            embedding: WORD_EMBEDDINGS,
            head: LM_HEAD,
            tied: false,
            warning: None,
        },
    })
}
