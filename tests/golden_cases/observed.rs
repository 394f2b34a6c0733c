//! What one forward pass left in a stage that holds the whole model, by the names of the reference.

use mp_train::adapter::prefix::PrefixBlock;
use mp_train::backend::{AttentionLayout, Backend, Element, HeadLayout};
use mp_train::config::architecture::{NormKind, QkvLayout, RotaryKind};
use mp_train::config::model::ModelConfig;
use mp_train::model::activations::Slot;
use mp_train::model::head::LogitsRows;

use super::batch::Batch;
use super::compare::{Found, FoundTensors};
use super::manifest::Form;
use super::single::{Parts, Single};
use super::{Golden, Outcome, names};

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
    parts: &Parts<'_>,
    batch: &Batch,
    prefix_len: usize,
) -> Outcome<FoundTensors> {
    let mut found = FoundTensors::new();
    found.insert("position_ids".into(), batch.position_ids());
    let mask = batch.attention_mask(prefix_len);
    found.insert("attention_mask".into(), mask);
    let vocab = parts.config.vocab_size;
    let (rows, hidden) = (batch.micro.tokens(), parts.config.hidden_size);
    let Single { backend, stage, .. } = single;
    let backend = &*backend;
    let all = stage.logits(backend, 0, LogitsRows::All)?;
    let all = all.ok_or("the stage has no head")?;
    found.insert("logits".into(), batch.spread(&widened(all.logits), vocab));
    let normed = batch.spread(&widened(all.normed), hidden);
    found.insert("hidden.final_norm".into(), normed);

    let slot = stage.slot(0, 0);
    let mut between = Vec::new();
    for input in &slot.inputs {
        between.push(read!(backend, input, rows * hidden));
    }
    between.push(read!(backend, stage.output(), rows * hidden));
    for (index, values) in between.iter().enumerate() {
        let name = match index {
            0 => "hidden.embedding".to_owned(),
            index => names::block_output(index - 1),
        };
        found.insert(name, batch.spread(values, hidden));
    }
    for layer in 0..slot.attention.len() {
        let inside = block(backend, slot, layer, &between, parts, batch)?;
        let named = inside.into_iter();
        found.extend(named.map(|(name, tensor)| (format!("layer{layer}.{name}"), tensor)));
    }
    Ok(found)
}

/// Where heads lie in a row of queries, keys and values.
fn layout(config: &ModelConfig) -> AttentionLayout {
    let (heads, groups, dim) = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    );
    match config.architecture.qkv {
        QkvLayout::PerHead => AttentionLayout::grouped_per_head(heads, dim),
        QkvLayout::Concatenated => AttentionLayout::concatenated(heads, groups, dim),
    }
}

/// `[T, width]` of each head.
fn heads(values: &[f64], place: HeadLayout, count: usize, dim: usize) -> Vec<Vec<f64>> {
    let head = |head: usize| {
        let rows = values.chunks_exact(place.row);
        let parts = rows.flat_map(|row| &row[place.offset + head * place.stride..][..dim]);
        parts.copied().collect()
    };
    (0..count).map(head).collect()
}

/// The heads beside each other, `[T, heads * dim]`.
fn joined(heads: &[Vec<f64>], dim: usize) -> Vec<f64> {
    let rows = heads.first().map_or(0, |head| head.len() / dim);
    let row = |row: usize| heads.iter().flat_map(move |head| &head[row * dim..][..dim]);
    (0..rows).flat_map(row).copied().collect()
}

/// Heads before the rotary step, from those behind it; the other way round by its definition. Nothing
/// where no case asks for it.
fn unrotated(config: &ModelConfig, positions: &[u32], head: &[f64]) -> Option<Vec<f64>> {
    let RotaryKind::Interleaved {
        width,
        base,
        position_divisor,
    } = config.architecture.rotary
    else {
        return None;
    };
    let mut head = head.to_vec();
    let rows = head.chunks_exact_mut(config.head_dim);
    for (row, &position) in rows.zip(positions) {
        for (pair, elements) in row[..width].chunks_exact_mut(2).enumerate() {
            let frequency = base.powf(-2.0 * pair as f64 / width as f64);
            let (sin, cos) = (f64::from(position) / position_divisor * frequency).sin_cos();
            let (even, odd) = (elements[0], elements[1]);
            (elements[0], elements[1]) = (even * cos + odd * sin, odd * cos - even * sin);
        }
    }
    Some(head)
}

/// The inside of a block. The engine keeps no output of a branch, only the sum with the residual, no
/// attention probabilities, only their logarithmic normaliser, and queries and keys only behind the
/// rotary step: these are worked out again.
fn block<B: Backend>(
    backend: &B,
    slot: &Slot<B>,
    layer: usize,
    between: &[Vec<f64>],
    parts: &Parts<'_>,
    batch: &Batch,
) -> Outcome<Vec<(&'static str, Found)>> {
    let config = &parts.config;
    let (attention, dense) = (&slot.attention[layer], &slot.dense[layer]);
    let (input, output) = (&between[layer], &between[layer + 1]);
    let (rows, hidden) = (batch.micro.tokens(), config.hidden_size);
    let (count, dim) = (config.num_attention_heads, config.head_dim);
    let norm1 = read!(backend, &dense.norm1, rows * hidden);
    let norm2 = read!(backend, &dense.norm2, rows * hidden);
    let sum = read!(backend, &attention.sum, rows * hidden);
    let (inner_width, width) = (config.mlp_width(), config.inner_hidden_size);
    let inner = read!(backend, &dense.inner, rows * inner_width);
    let activated = read!(backend, &dense.activated, rows * width);
    let context = read!(backend, &attention.context, rows * config.query_width());
    // What the branch is added to is the norm's output, or its input.
    let branch = |sum: &[f64], normed: &[f64], unnormed: &[f64]| -> Vec<f64> {
        let (alpha, residual) = match config.architecture.norm {
            NormKind::Layer => (parts.family.residual_alpha(), normed),
            NormKind::Rms => (1.0, unnormed),
        };
        let pairs = sum.iter().zip(residual);
        pairs
            .map(|(sum, residual)| sum - alpha * residual)
            .collect()
    };
    let attention_output = branch(&sum, &norm1, input);
    let mlp_output = branch(output, &norm2, &sum);

    let layout = layout(config);
    let qkv = read!(backend, &attention.qkv, rows * layout.query.row);
    let query = heads(&qkv, layout.query, count, dim);
    let groups = [layout.key, layout.value].map(|place| heads(&qkv, place, layout.kv_heads, dim));
    let of_query = |head: usize| head / (count / layout.kv_heads);
    // Key and value heads once for each query head.
    let expanded = |groups: &[Vec<f64>]| -> Vec<Vec<f64>> {
        let head = |head| groups[of_query(head)].clone();
        (0..count).map(head).collect()
    };
    let [key, value] = groups.each_ref().map(|groups| expanded(groups));
    let lse = read!(backend, &attention.lse, rows * count);
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
                        let score = dot / (dim as f64).sqrt() - lse[row * count + head];
                        let (_, column) = batch.places[sequence.start + k];
                        probs[row * seq + column] = score.exp();
                    }
                }
            }
        }
        probs
    };
    let probs: Vec<Vec<f64>> = (0..count).map(probs).collect();
    let mut found = vec![
        ("input", batch.spread(input, hidden)),
        ("input_layernorm", batch.spread(&norm1, hidden)),
        ("query_rotated", batch.spread_heads(&query, dim)),
        ("key_rotated", batch.spread_heads(&groups[0], dim)),
        ("key_rotated_expanded", batch.spread_heads(&key, dim)),
        ("value", batch.spread_heads(&value, dim)),
        (
            "attention_context",
            batch.spread(&context, config.query_width()),
        ),
        ("sum", batch.spread(&sum, hidden)),
        ("post_attention_layernorm", batch.spread(&norm2, hidden)),
        ("inner", batch.spread(&inner, inner_width)),
        ("activated", batch.spread(&activated, width)),
        ("output", batch.spread(output, hidden)),
        (
            "attention_probs",
            batch.spread_heads(&probs, batch.shape[1]).recomputed(),
        ),
        (
            "attention_output",
            batch.spread(&attention_output, hidden).recomputed(),
        ),
        ("mlp_output", batch.spread(&mlp_output, hidden).recomputed()),
    ];
    let before = |heads: &[Vec<f64>]| -> Option<Vec<f64>> {
        let heads = heads.iter();
        let heads = heads.map(|head| unrotated(config, &batch.micro.position, head));
        Some(joined(&heads.collect::<Option<Vec<_>>>()?, dim))
    };
    if let (Some(query), Some(key)) = (before(&query), before(&groups[0])) {
        let parts = [query, key, joined(&groups[1], dim)];
        let widths = parts.each_ref().map(|part| part.len() / rows);
        let row = |row: usize| {
            let parts = parts.iter().zip(widths);
            parts.flat_map(move |(part, width)| part[row * width..][..width].to_vec())
        };
        let fused: Vec<f64> = (0..rows).flat_map(row).collect();
        let fused = batch.spread(&fused, widths.iter().sum());
        found.push(("query_key_value", fused.recomputed()));
        for ((name, part), width) in ["q_proj", "k_proj", "v_proj"]
            .into_iter()
            .zip(&parts)
            .zip(widths)
        {
            found.push((name, batch.spread(part, width).recomputed()));
        }
    }
    Ok(found)
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

/// Keys and values of the prefix from the engine's `[P, 2, G, D]`: `[layer, 2, head, P, D]`, or with the
/// prefix positions before the heads.
pub fn prefix_key_value<B: Backend>(
    single: &mut Single<B>,
    parts: &Parts<'_>,
    len: usize,
) -> Outcome<Found> {
    let config = &parts.config;
    let (heads, dim, layers) = (
        config.num_key_value_heads,
        config.head_dim,
        config.num_layers,
    );
    let heads_first = parts.family.form() == Form::Named;
    let prefix = single.stage.prefix_mut().ok_or("the stage has no prefix")?;
    let mut values: Vec<f64> = Vec::new();
    for layer in 0..layers {
        let block: &PrefixBlock<B> = prefix.block(layer);
        let rows = read!(single.backend, block.key_value(), len * 2 * heads * dim);
        for kind in 0..2 {
            for index in 0..heads * len {
                let (head, position) = match heads_first {
                    true => (index / len, index % len),
                    false => (index % heads, index / heads),
                };
                let start = ((position * 2 + kind) * heads + head) * dim;
                values.extend(&rows[start..start + dim]);
            }
        }
    }
    let shape = match heads_first {
        true => [layers, 2, heads, len, dim],
        false => [layers, 2, len, heads, dim],
    };
    Ok(Found::whole(shape, &values))
}
