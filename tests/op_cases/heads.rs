//! Ops on heads: attention over causal sequences, and the rotary embedding.

use mp_train::backend::{AttentionLayout, Backend, RotaryPositions, Span};

use super::{Batch, Bound, Case, Sizes, Visit, Work, elements, memory, stored, words};

const QUERIES: &str = "each block of 64 queries reads the keys and values that they see";
const BACKWARD: &str = "scores are computed twice, by blocks of 64 keys and by blocks of 64 queries, \
                        instead of added up by atomics; a pass before them sums dout * out";
const ROTARY: &str = "each head reads the cosines and sines of its row again, from the L1 cache";

pub(super) fn visit<B: Backend>(b: &B, sizes: &Sizes, batches: &[Batch], visit: &mut Visit<'_, B>) {
    for &batch in batches {
        forward(b, sizes, batch, visit);
        backward(b, sizes, batch, visit);
    }
    rotary(b, sizes, visit);
}

fn layout(sizes: &Sizes) -> AttentionLayout {
    AttentionLayout::grouped_per_head(sizes.heads, sizes.head_dim)
}

fn causal((sequences, length): Batch) -> Vec<Span> {
    let span = |sequence: usize| Span {
        q_start: sequence * length,
        q_len: length,
        kv_start: sequence * length,
        kv_len: length,
        context_length: 0,
    };
    (0..sequences).map(span).collect()
}

/// Operations of one product over all visible pairs of a query and a key.
fn product_flops(sizes: &Sizes, (sequences, length): Batch) -> usize {
    2 * sizes.heads * sizes.head_dim * sequences * length * (length + 1) / 2
}

fn scale(sizes: &Sizes) -> f32 {
    1.0 / (sizes.head_dim as f32).sqrt()
}

fn case<B: Backend>(
    b: &B,
    visit: &mut Visit<'_, B>,
    (direction, (sequences, length)): (&str, Batch),
    work: Work,
    note: &'static str,
    run: impl FnMut(&B) -> Result<(), mp_train::backend::BackendError> + 'static,
) {
    visit(
        b,
        Case {
            name: format!("attention {direction} {sequences}x{length}"),
            bound: Bound::Attention,
            work,
            note,
            run: Box::new(run),
        },
    );
}

fn forward<B: Backend>(b: &B, sizes: &Sizes, batch: Batch, visit: &mut Visit<'_, B>) {
    let (layout, spans, scale) = (layout(sizes), causal(batch), scale(sizes));
    let rows = batch.0 * batch.1;
    let width = sizes.heads * sizes.head_dim;
    let qkv = elements(b, rows * 3 * width, 1.0);
    let mut out = b.zeros(rows * width).unwrap();
    let mut lse = b.zeros(rows * sizes.heads).unwrap();
    let work = Work::over(
        rows * width,
        stored::<B>(3 * rows * width),
        stored::<B>(rows * width) + words(rows * sizes.heads),
    );
    // Scores, and their products with the values.
    let work = work.with_flops(2 * product_flops(sizes, batch));
    case(b, visit, ("forward", batch), work, QUERIES, move |b| {
        b.attention(&mut out, &mut lse, &qkv, &qkv, None, &layout, &spans, scale)
    });
}

fn backward<B: Backend>(b: &B, sizes: &Sizes, batch: Batch, visit: &mut Visit<'_, B>) {
    let (layout, spans, scale) = (layout(sizes), causal(batch), scale(sizes));
    let rows = batch.0 * batch.1;
    let width = sizes.heads * sizes.head_dim;
    let qkv = elements(b, rows * 3 * width, 1.0);
    let dout = elements(b, rows * width, 0.1);
    let mut out = b.zeros(rows * width).unwrap();
    let mut lse = b.zeros(rows * sizes.heads).unwrap();
    let mut dqkv = b.zeros(rows * 3 * width).unwrap();
    b.attention(&mut out, &mut lse, &qkv, &qkv, None, &layout, &spans, scale)
        .unwrap();
    let work = Work::over(
        rows * width,
        stored::<B>((3 + 2) * rows * width) + words(rows * sizes.heads),
        stored::<B>(3 * rows * width),
    );
    // Scores again, and the gradients of values, probabilities, queries and keys: as FlashAttention
    // counts them, whatever is computed twice.
    let work = work.with_flops(5 * product_flops(sizes, batch));
    case(b, visit, ("backward", batch), work, BACKWARD, move |b| {
        b.attention_backward(
            &mut dqkv, None, &dout, &out, &lse, &qkv, None, &layout, &spans, scale,
        )
    });
}

/// ChatGLM-6B's, whose halves are turned by the position and by the place in the answer.
fn rotary<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let (layout, rows) = (layout(sizes), sizes.rows);
    let angles = sizes.head_dim / 4;
    let positions: Vec<u32> = (0..rows as u32).collect();
    let position = b.upload(&positions).unwrap();
    let block_position = b.upload(&positions).unwrap();
    let cos = elements::<B, f32>(b, rows * angles, 1.0);
    let sin = elements::<B, f32>(b, rows * angles, 1.0);
    let mut x = elements(b, rows * 3 * sizes.heads * sizes.head_dim, 1.0);
    let turned = stored::<B>(2 * rows * sizes.heads * sizes.head_dim);
    let work = Work::over(
        2 * rows * sizes.heads * sizes.head_dim,
        turned + 2 * words(rows * angles) + 2 * words(rows),
        turned,
    );
    memory(b, visit, "rotary", work, ROTARY, move |b| {
        let positions = RotaryPositions::TwoDimensional {
            position: &position,
            block_position: &block_position,
        };
        b.rotary(&mut x, &cos, &sin, positions, &layout, rows, false)
    });
}
