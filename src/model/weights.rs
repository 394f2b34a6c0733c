//! Which tensors a model has, with their shapes, and whether a folder holds them.

use std::collections::HashSet;

use super::names::{LinearSite, Names, NormSite};
use super::{ModelError, quantised};
use crate::checkpoint::pieces::same_tensor;
use crate::checkpoint::{Dtype, TensorInfo, TensorSource};
use crate::config::architecture::NormKind;
use crate::config::model::ModelConfig;

/// Name and shape of a tensor.
pub type NamedShape = (String, Vec<usize>);

/// The tensors of a norm, by its module name.
pub fn norm_tensors(config: &ModelConfig, module: &str) -> Vec<NamedShape> {
    let kinds: &[&str] = match config.architecture.norm {
        NormKind::Layer => &["weight", "bias"],
        NormKind::Rms => &["weight"],
    };
    let tensor = |kind: &&str| (format!("{module}.{kind}"), vec![config.hidden_size]);
    kinds.iter().map(tensor).collect()
}

fn linear_tensors(config: &ModelConfig, site: LinearSite, layer: usize) -> Vec<NamedShape> {
    let (in_features, out_features) = site.features(config);
    let module = Names::of(config).linear(site, layer);
    let mut tensors = vec![(format!("{module}.weight"), vec![out_features, in_features])];
    if site.has_bias(config) {
        tensors.push((format!("{module}.bias"), vec![out_features]));
    }
    tensors
}

/// The tensors of block `layer`, in the order of the forward pass.
pub fn block_tensors(config: &ModelConfig, layer: usize) -> Vec<NamedShape> {
    let names = Names::of(config);
    let norm = |site| norm_tensors(config, &names.norm(site, layer));
    let mut tensors = norm(NormSite::Input);
    for site in names.linear_sites() {
        if site == LinearSite::HTo4h {
            tensors.extend(norm(NormSite::PostAttention));
        }
        tensors.extend(linear_tensors(config, site, layer));
    }
    tensors
}

/// Name of the scales beside a weight that is stored as codes.
pub fn scale_name(weight: &str) -> String {
    format!("{weight}_scale")
}

/// All tensors of a model, lm_head included, in the order of the forward pass.
pub fn model_tensors(config: &ModelConfig) -> Vec<NamedShape> {
    let names = Names::of(config);
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let mut tensors = vec![(names.word_embeddings.to_owned(), vec![vocab, hidden])];
    for layer in 0..config.num_layers {
        tensors.extend(block_tensors(config, layer));
    }
    tensors.extend(norm_tensors(config, names.final_norm));
    tensors.push((names.lm_head.to_owned(), vec![vocab, hidden]));
    tensors
}

/// The same, without lm_head where it is the embedding.
pub fn own_tensors(config: &ModelConfig, tied: bool) -> Vec<NamedShape> {
    let mut tensors = model_tensors(config);
    if tied {
        tensors.pop();
    }
    tensors
}

/// Whether it is the weight of a linear layer of a block: the only tensors that are held as codes.
pub fn is_block_matrix(config: &ModelConfig, name: &str, shape: &[usize]) -> bool {
    let names = Names::of(config);
    shape.len() == 2 && name != names.word_embeddings && name != names.lm_head
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
            [rows, cols] if is_block_matrix(config, &name, &shape) => {
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

/// Everything about names, shapes and codes of a model folder that contradicts its configuration, whose
/// `quantization` is that of the folder: one entry for each tensor that is not as it should be, one for all
/// that are missing and one for all that nobody knows.
pub fn problems(source: &dyn TensorSource, config: &ModelConfig) -> Vec<ModelError> {
    let names = Names::of(config);
    let expected = stored_tensors(config);
    let (mut problems, mut missing) = (Vec::new(), Vec::new());
    for tensor in &expected {
        let Stored { name, shape, .. } = tensor;
        match source.info(name) {
            Some(info) => {
                if let Err(problem) = check_elements(tensor, &info) {
                    problems.push(problem);
                } else if info.shape != *shape {
                    problems.push(ModelError::WrongShape {
                        file: info.file,
                        name: name.clone(),
                        found: info.shape,
                        expected: shape.clone(),
                    });
                }
            }
            None if name == names.lm_head || name == names.word_embeddings => {}
            None => missing.push(name.clone()),
        }
    }
    let has = |name| source.info(name).is_some();
    if !(has(names.word_embeddings) || has(names.lm_head) && config.tie_word_embeddings) {
        missing.insert(0, names.word_embeddings.to_owned());
    }
    if let Some(name) = missing.first() {
        problems.push(ModelError::MissingTensor {
            name: name.clone(),
            count: missing.len(),
        });
    }
    let known: HashSet<&str> = expected.iter().map(|tensor| &tensor.name[..]).collect();
    let found = source.names();
    let is_extra = |name: &&String| !names.is_ignored(name) && !known.contains(&name[..]);
    let extra: Vec<&String> = found.iter().filter(is_extra).collect();
    if let Some(name) = extra.first() {
        problems.push(ModelError::ExtraTensor {
            file: source.info(name).map(|info| info.file).unwrap_or_default(),
            name: (*name).clone(),
            count: extra.len(),
        });
    }
    problems
}

/// Checks a model folder against its configuration, and decides which matrix the embedding and the head
/// are.
///
/// # Errors
/// The first of [`problems`]; reading fails.
pub fn check(source: &dyn TensorSource, config: &ModelConfig) -> Result<HeadSource, ModelError> {
    if let Some(problem) = problems(source, config).into_iter().next() {
        return Err(problem);
    }
    let names = Names::of(config);
    let has = |name| source.info(name).is_some();
    let (embedding, head) = (has(names.word_embeddings), has(names.lm_head));
    head_source(source, config, embedding, head)
}

/// Decides which matrix the embedding and the head are.
fn head_source(
    source: &dyn TensorSource,
    config: &ModelConfig,
    embedding: bool,
    head: bool,
) -> Result<HeadSource, ModelError> {
    let Names {
        word_embeddings,
        lm_head,
        ..
    } = Names::of(config);
    let both = |name, warning| HeadSource {
        embedding: name,
        head: name,
        tied: true,
        warning,
    };
    Ok(match (embedding, head) {
        (true, false) if config.tie_word_embeddings => both(word_embeddings, None),
        (true, false) => both(
            word_embeddings,
            Some(format!(
                "`{lm_head}` is absent although config.json says tie_word_embeddings = false; \
                 the embedding is used for both"
            )),
        ),
        (false, _) => both(lm_head, None),
        (true, true) if config.tie_word_embeddings => {
            // Hugging Face's loader shares the matrices and reads lm_head last, so that it wins.
            let differ = !same_tensor(source, word_embeddings, lm_head)?;
            let warning = format!(
                "`{word_embeddings}` and `{lm_head}` differ although config.json ties them (its \
                 default); `{lm_head}` is used for both, as Hugging Face does. Set \
                 \"tie_word_embeddings\": false in config.json if they are meant to differ"
            );
            both(lm_head, differ.then_some(warning))
        }
        (true, true) => HeadSource {
            embedding: word_embeddings,
            head: lm_head,
            tied: false,
            warning: None,
        },
    })
}
