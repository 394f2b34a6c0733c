//! What one forward pass left in a stage that holds the whole model, by the names of the reference.

use mp_train::adapter::prefix::PrefixBlock;
use mp_train::backend::{Backend, Element};
use mp_train::model::activations::Slot;
use mp_train::model::head::LogitsRows;

use super::batch::Batch;
use super::case::Family;
use super::compare::{Found, FoundTensors};
use super::single::Single;
use super::{Golden, Outcome};

fn widened<E: Element>(values: Vec<E>) -> Vec<f64> {
    values
        .into_iter()
        .map(|value| value.to_f32().into())
        .collect()
}

/// Reads activations of type `T` as f64.
macro_rules! read {
    ($backend:expr, $buffer:expr, $len:expr) => {
        widened($backend.read($buffer, $len)?)
    };
}

/// Everything that a forward pass of the batch in slot 0 shows.
pub fn forward<B: Backend>(
    single: &mut Single<B>,
    family: &Family,
    batch: &Batch,
    prefix_len: usize,
) -> Outcome<FoundTensors> {
    let mut found = FoundTensors::new();
    found.insert("position_ids".into(), batch.position_ids());
    let mask = batch.attention_mask(prefix_len);
    found.insert("attention_mask".into(), mask);
    let vocab = family.config.vocab_size;
    let (rows, hidden) = (batch.micro.tokens(), family.config.hidden_size);
    let Single { backend, stage, .. } = single;
    let backend = &*backend;
    let all = stage.logits(backend, 0, LogitsRows::All)?;
    let all = all.ok_or("the stage has no head")?;
    found.insert("logits".into(), batch.spread(&widened(all.logits), vocab));
    let normed = batch.spread(&widened(all.normed), hidden);
    found.insert("hidden.final_norm".into(), normed);

    let slot = stage.slot(0, 0);
    let mut outputs = Vec::new();
    for input in &slot.inputs {
        outputs.push(read!(backend, input, rows * hidden));
    }
    outputs.push(read!(backend, stage.output(), rows * hidden));
    for (index, values) in outputs.iter().enumerate() {
        let name = match index {
            0 => "hidden.embedding".to_owned(),
            index => format!("hidden.block_{:02}", index - 1),
        };
        found.insert(name, batch.spread(values, hidden));
    }
    for layer in 0..slot.attention.len() {
        let inside = block(backend, slot, layer, &outputs[layer + 1], family, batch)?;
        let named = inside.into_iter();
        found.extend(named.map(|(name, tensor)| (format!("layer{layer}.{name}"), tensor)));
    }
    Ok(found)
}

/// The inside of a block. The engine keeps no output of a branch, only the sum with the residual, and
/// no attention probabilities, only their logarithmic normaliser: these are worked out again.
fn block<B: Backend>(
    backend: &B,
    slot: &Slot<B>,
    layer: usize,
    output: &[f64],
    family: &Family,
    batch: &Batch,
) -> Outcome<Vec<(&'static str, Found)>> {
    let (attention, dense) = (&slot.attention[layer], &slot.dense[layer]);
    let (rows, hidden) = (batch.micro.tokens(), family.config.hidden_size);
    let (heads, dim) = (family.config.num_attention_heads, family.config.head_dim);
    let alpha = family.residual_alpha()?;
    let norm1 = read!(backend, &dense.norm1, rows * hidden);
    let norm2 = read!(backend, &dense.norm2, rows * hidden);
    let sum = read!(backend, &attention.sum, rows * hidden);
    let context = read!(backend, &attention.context, rows * hidden);
    let branch = |sum: &[f64], residual: &[f64]| -> Vec<f64> {
        let pairs = sum.iter().zip(residual);
        pairs
            .map(|(sum, residual)| sum - alpha * residual)
            .collect()
    };
    let attention_output = branch(&sum, &norm1);
    let mlp_output = branch(output, &norm2);

    let qkv = read!(backend, &attention.qkv, rows * 3 * hidden);
    let part = |part: usize| -> Vec<Vec<f64>> {
        let head = |head: usize| {
            let rows = qkv.chunks_exact(3 * hidden);
            let values = rows.flat_map(|row| &row[(head * 3 + part) * dim..][..dim]);
            values.copied().collect()
        };
        (0..heads).map(head).collect()
    };
    let (query, key, value) = (part(0), part(1), part(2));
    let lse = read!(backend, &attention.lse, rows * heads);
    let probs = |head: usize| -> Vec<f64> {
        let seq = batch.shape[1];
        let mut probs = vec![0.0; rows * seq];
        for sequence in &batch.micro.sequences {
            for t in 0..sequence.len {
                let row = sequence.start + t;
                for k in 0..sequence.len {
                    if k <= t || k < sequence.context_length {
                        let q = &query[head][row * dim..][..dim];
                        let key = &key[head][(sequence.start + k) * dim..][..dim];
                        let dot: f64 = q.iter().zip(key).map(|(q, k)| q * k).sum();
                        let score = dot / (dim as f64).sqrt() - lse[row * heads + head];
                        let (_, column) = batch.places[sequence.start + k];
                        probs[row * seq + column] = score.exp();
                    }
                }
            }
        }
        probs
    };
    let probs: Vec<Vec<f64>> = (0..heads).map(probs).collect();
    Ok(vec![
        ("input_layernorm", batch.spread(&norm1, hidden)),
        ("query_rotated", batch.spread_heads(&query, dim)),
        ("key_rotated", batch.spread_heads(&key, dim)),
        ("value", batch.spread_heads(&value, dim)),
        ("attention_context", batch.spread(&context, hidden)),
        ("post_attention_layernorm", batch.spread(&norm2, hidden)),
        (
            "attention_probs",
            batch.spread_heads(&probs, batch.shape[1]).recomputed(),
        ),
        (
            "attention_output",
            batch.spread(&attention_output, hidden).recomputed(),
        ),
        ("mlp_output", batch.spread(&mlp_output, hidden).recomputed()),
    ])
}

/// Loss of each target and their mean, after [`Single::loss`].
pub fn loss<B: Backend>(
    single: &mut Single<B>,
    batch: &Batch,
    found: &mut FoundTensors,
) -> Outcome<()> {
    let targets = batch.micro.targets.len();
    let losses = single.stage.slot(0, 0).token_loss.as_ref();
    let losses = losses.ok_or("the stage has no head")?;
    let mut sum = single.backend.zeros::<f32>(1)?;
    single.backend.sum(&mut sum, 0, losses, targets)?;
    let sum = single.backend.read(&sum, 1)?[0];
    let losses = read!(single.backend, losses, targets);
    found.insert("token_loss".into(), batch.token_loss(&losses));
    found.insert("loss".into(), Found::scalar(sum / targets as f32));
    Ok(())
}

/// Gradients by name, parts put together and the loss scale taken out, after [`Single::backward`].
pub fn gradients<B: Golden>(single: &mut Single<B>, found: &mut FoundTensors) -> Outcome<()> {
    let mut whole = std::collections::BTreeMap::new();
    for parameter in single.stage.parameters() {
        if !parameter.written() {
            return Err(format!("`{}` was never written", parameter.spec().title()).into());
        }
        let spec = parameter.spec();
        let (_, values) = whole.entry(spec.name.clone()).or_insert_with(|| {
            (
                spec.shape.clone(),
                vec![f32::NAN; spec.shape.iter().product()],
            )
        });
        let mut part = single.backend.read(parameter.gradient(), spec.len())?;
        part.iter_mut().for_each(|value| *value /= B::loss_scale());
        spec.paste(values, &part);
    }
    for (name, (shape, values)) in whole {
        found.insert(format!("grad.{name}"), Found::whole(shape, &values));
    }
    Ok(())
}

/// Keys and values of the prefix, `[layer, 2, head, P, D]`, from the engine's `[P, 2, G, D]`.
pub fn prefix_key_value<B: Backend>(
    single: &mut Single<B>,
    family: &Family,
    len: usize,
) -> Outcome<Found> {
    let (heads, dim) = (family.config.num_attention_heads, family.config.head_dim);
    let prefix = single.stage.prefix_mut().ok_or("the stage has no prefix")?;
    let mut values: Vec<f64> = Vec::new();
    for layer in 0..family.config.num_layers {
        let block: &PrefixBlock<B> = prefix.block(layer);
        let rows = read!(single.backend, block.key_value(), len * 2 * heads * dim);
        for kind_and_head in 0..2 * heads {
            for position in 0..len {
                let start = (position * 2 * heads + kind_and_head) * dim;
                values.extend(&rows[start..start + dim]);
            }
        }
    }
    Ok(Found::whole(
        [family.config.num_layers, 2, heads, len, dim],
        &values,
    ))
}
