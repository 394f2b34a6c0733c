//! Attention: launchers of kernels/attention_forward.cu and kernels/attention_backward.cu.

use half::f16;

use super::device::{Argument, Geometry, Kernel, Pointer};
use super::error::CudaError;
use super::memory::CudaBuffer;
use super::module::Modules;
use super::spans::{self, SpanTable, Table};
use super::tiles;
use super::{Cuda, OpRooms, Result};
use crate::backend::{AttentionLayout, BackendError, HeadLayout, Prefix, Span};

const FORWARD: &str = "attention_forward.cu";
const BACKWARD: &str = "attention_backward.cu";

/// Threads of a block: `ATTENTION_THREADS` of kernels/attention.cuh.
const THREADS: u32 = 128;

/// The head_dims that the tensor-core kernels are made for; a head is padded to the next.
const WIDTHS: [usize; 5] = [16, 32, 64, 96, 128];

/// Largest head_dim of the plain kernels: `PLAIN_DIM` of kernels/attention.cuh.
const PLAIN_DIM: usize = 256;

/// A kernel for each of [`WIDTHS`], then the plain one.
type ByWidth = [Kernel; WIDTHS.len() + 1];

/// Kernels of the family, and the tables of tiles that they go by.
pub(super) struct Kernels {
    forward: ByWidth,
    backward_query: ByWidth,
    backward_key: ByWidth,
    delta: Kernel,
    store_by_8: Kernel,
    store_by_1: Kernel,
    query_tiles: SpanTable,
    key_tiles: SpanTable,
}

macro_rules! names {
    ($stem:literal) => {
        [
            concat!($stem, "_16"),
            concat!($stem, "_32"),
            concat!($stem, "_64"),
            concat!($stem, "_96"),
            concat!($stem, "_128"),
            concat!($stem, "_plain"),
        ]
    };
}

fn by_width(
    names: [&'static str; WIDTHS.len() + 1],
    load: impl Fn(usize, &'static str) -> Result<Kernel>,
) -> Result<ByWidth> {
    let [a, b, c, d, e, plain] = names;
    Ok([
        load(0, a)?,
        load(1, b)?,
        load(2, c)?,
        load(3, d)?,
        load(4, e)?,
        load(WIDTHS.len(), plain)?,
    ])
}

/// Dynamic shared memory of `attention_backward_key`: 64 keys and values; queries and dout of 32 rows,
/// with two f32 each, in two stages (one on sm_75). A row of halves is padded by 16 bytes.
fn key_shared(width: usize, capability: u32) -> u32 {
    let row = 2 * (width + 8);
    let stages = if capability >= 80 { 2 } else { 1 };
    let passing = 2 * 32 * row + 2 * 32 * size_of::<f32>();
    (2 * 64 * row + stages * passing) as u32
}

impl Kernels {
    pub fn load(modules: &Modules, capability: u32) -> Result<Self> {
        let backward_key = |index: usize, name| match WIDTHS.get(index) {
            Some(&width) => {
                modules.kernel_with_shared(BACKWARD, name, key_shared(width, capability))
            }
            None => modules.kernel(BACKWARD, name),
        };
        Ok(Kernels {
            forward: by_width(names!("attention_forward"), |_, name| {
                modules.kernel(FORWARD, name)
            })?,
            backward_query: by_width(names!("attention_backward_query"), |_, name| {
                modules.kernel(BACKWARD, name)
            })?,
            backward_key: by_width(names!("attention_backward_key"), backward_key)?,
            delta: modules.kernel(BACKWARD, "attention_delta")?,
            store_by_8: modules.kernel(FORWARD, "store_key_value_by_8")?,
            store_by_1: modules.kernel(FORWARD, "store_key_value_by_1")?,
            query_tiles: SpanTable::new(),
            key_tiles: SpanTable::new(),
        })
    }
}

/// `HeadPlace` of kernels/attention.cuh.
#[repr(C)]
struct HeadPlace {
    row: u32,
    offset: u32,
    stride: u32,
}

impl HeadPlace {
    fn of(layout: HeadLayout) -> Self {
        HeadPlace {
            row: layout.row as u32,
            offset: layout.offset as u32,
            stride: layout.stride as u32,
        }
    }
}

/// `AttentionShape` of kernels/attention.cuh.
#[repr(C)]
struct Shape {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    query: HeadPlace,
    key: HeadPlace,
    value: HeadPlace,
    prefix_len: u32,
    prefix_stride: u32,
    scale: f32,
}

// SAFETY: fifteen words in the order of the kernels' struct.
unsafe impl Argument for Shape {}

impl Shape {
    fn of(layout: &AttentionLayout, prefix: Option<Prefix<'_, Cuda>>, scale: f32) -> Self {
        let prefix_len = prefix.map_or(0, |prefix| prefix.len);
        let per_sequence = prefix.is_some_and(|prefix| prefix.per_sequence);
        let prefix_width = prefix_len * layout.key_value_width();
        Shape {
            heads: layout.heads as u32,
            kv_heads: layout.kv_heads as u32,
            head_dim: layout.head_dim as u32,
            query: HeadPlace::of(layout.query),
            key: HeadPlace::of(layout.key),
            value: HeadPlace::of(layout.value),
            prefix_len: prefix_len as u32,
            prefix_stride: if per_sequence { prefix_width as u32 } else { 0 },
            scale,
        }
    }
}

fn on_16_bytes(layout: &AttentionLayout, places: &[HeadLayout]) -> bool {
    let whole =
        |place: &HeadLayout| [place.row, place.offset, place.stride].map(|x| x % 8) == [0; 3];
    layout.head_dim.is_multiple_of(8) && places.iter().all(whole)
}

/// Which of the kernels takes such heads: a place in [`WIDTHS`], or the one behind for the plain kernel.
fn choice(cuda: &Cuda, layout: &AttentionLayout, scale: f32) -> Result<usize> {
    if layout.head_dim > PLAIN_DIM {
        return Err(BackendError::Cuda(CudaError::Call {
            ordinal: cuda.device.ordinal(),
            call: "attention",
            reason: format!(
                "head_dim is {}, the kernels take up to {PLAIN_DIM}",
                layout.head_dim
            ),
        }));
    }
    let width = WIDTHS.iter().position(|&width| layout.head_dim <= width);
    let places = [layout.query, layout.key, layout.value];
    Ok(match width {
        Some(index) if scale > 0.0 && on_16_bytes(layout, &places) => index,
        _ => WIDTHS.len(),
    })
}

/// A block per tile and head.
fn over(tiles: Table, heads: usize) -> Geometry {
    Geometry {
        grid: [tiles.rows, heads as u32, 1],
        threads: THREADS,
        shared: 0,
    }
}

fn query_tiles(cuda: &Cuda, spans: &[Span]) -> Result<Table> {
    let table = &cuda.attention.query_tiles;
    table.get(cuda, spans, 0, tiles::of_queries)
}

pub(super) fn store_key_value(
    cuda: &Cuda,
    cache: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    slots: &CudaBuffer<u32>,
    layout: &AttentionLayout,
    rows: usize,
) -> Result<()> {
    let (kernel, group) = match on_16_bytes(layout, &[layout.key, layout.value]) {
        true => (&cuda.attention.store_by_8, 8),
        false => (&cuda.attention.store_by_1, 1),
    };
    let threads = 256;
    let blocks = (rows * layout.key_value_width() / group).div_ceil(threads);
    let geometry = Geometry::line(blocks.min(MOST_BLOCKS) as u32, threads as u32);
    let (rows, shape) = (rows as u32, Shape::of(layout, None, 0.0));
    cuda.device
        .launch(kernel, geometry, &[cache, x, slots, &rows, &shape])
}

/// Blocks of a grid-stride loop: more than any GPU runs at once.
const MOST_BLOCKS: usize = 1 << 16;

#[allow(clippy::too_many_arguments)]
pub(super) fn attention(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    lse: &mut CudaBuffer<f32>,
    query: &CudaBuffer<f16>,
    key_value: &CudaBuffer<f16>,
    prefix: Option<Prefix<'_, Cuda>>,
    layout: &AttentionLayout,
    spans: &[Span],
    scale: f32,
) -> Result<()> {
    let kernel = &cuda.attention.forward[choice(cuda, layout, scale)?];
    let (span_table, tiles) = (cuda.spans(spans)?, query_tiles(cuda, spans)?);
    let shape = Shape::of(layout, prefix, scale);
    let prefix = prefix.map_or(Pointer::NULL, |prefix| prefix.key_value.at());
    cuda.device.launch(
        kernel,
        over(tiles, layout.heads),
        &[
            out,
            lse,
            query,
            key_value,
            &prefix,
            &span_table.at,
            &tiles.at,
            &shape,
        ],
    )
}

/// Bytes of scratch for that many rows.
fn delta_bytes(rows: usize, heads: usize) -> usize {
    rows * heads * size_of::<f32>()
}

/// Bytes of scratch for the largest micro-batch.
pub(super) fn scratch_bytes(rooms: &OpRooms) -> usize {
    delta_bytes(rooms.rows, rooms.heads)
}

/// Most tiles of queries and of keys.
fn most_tiles(rooms: &OpRooms) -> [usize; 2] {
    [0, rooms.prefix_len].map(|prefix_len| tiles::most(rooms.rows, rooms.sequences, prefix_len))
}

/// Words of the tables of sequences and tiles for the largest micro-batch.
pub(super) fn table_words(rooms: &OpRooms) -> [usize; 3] {
    let [queries, keys] = most_tiles(rooms).map(|most| most * tiles::WORDS);
    [rooms.sequences * spans::SPAN_WORDS, queries, keys].map(spans::table_words)
}

/// Takes the room of [`table_words`].
pub(super) fn reserve(cuda: &Cuda, rooms: &OpRooms) -> Result<()> {
    let [spans, queries, keys] = table_words(rooms);
    cuda.span_table.reserve(cuda, spans)?;
    cuda.attention.query_tiles.reserve(cuda, queries)?;
    cuda.attention.key_tiles.reserve(cuda, keys)
}

#[allow(clippy::too_many_arguments)]
pub(super) fn attention_backward(
    cuda: &Cuda,
    dqkv: &mut CudaBuffer<f16>,
    dprefix: Option<&mut CudaBuffer<f32>>,
    dout: &CudaBuffer<f16>,
    out: &CudaBuffer<f16>,
    lse: &CudaBuffer<f32>,
    qkv: &CudaBuffer<f16>,
    prefix: Option<Prefix<'_, Cuda>>,
    layout: &AttentionLayout,
    spans: &[Span],
    scale: f32,
) -> Result<()> {
    let kernels = &cuda.attention;
    let index = choice(cuda, layout, scale)?;
    let shape = Shape::of(layout, prefix, scale);
    let span_table = cuda.spans(spans)?;
    let query_tiles = query_tiles(cuda, spans)?;
    // Without a place for their gradient the keys of the prefix are left out.
    let prefix_len = shape.prefix_len as usize;
    let own_alone = dprefix.is_none();
    let key = 2 * shape.prefix_len + u32::from(own_alone);
    let key_tiles = kernels.key_tiles.get(cuda, spans, key, |spans| {
        tiles::of_keys(spans, prefix_len, own_alone)
    })?;

    let rows: usize = spans.iter().map(|span| span.q_len).sum();
    let delta_rows = rows * layout.heads;
    let delta = cuda.scratch(delta_bytes(rows, layout.heads))?;
    let threads = 256;
    let delta_geometry = Geometry::line((delta_rows as u32).div_ceil(threads / 32), threads);
    cuda.device.launch(
        &kernels.delta,
        delta_geometry,
        &[
            &delta,
            dout,
            out,
            &(delta_rows as u32),
            &(layout.head_dim as u32),
        ],
    )?;

    let dprefix = dprefix.map_or(Pointer::NULL, |dprefix| dprefix.at());
    let prefix = prefix.map_or(Pointer::NULL, |prefix| prefix.key_value.at());
    let shared = WIDTHS
        .get(index)
        .map_or(0, |&width| key_shared(width, cuda.device.capability()));
    cuda.device.launch(
        &kernels.backward_key[index],
        over(key_tiles, layout.kv_heads).with_shared(shared),
        &[
            dqkv,
            &dprefix,
            dout,
            lse,
            &delta,
            qkv,
            &prefix,
            &span_table.at,
            &key_tiles.at,
            &shape,
        ],
    )?;
    cuda.device.launch(
        &kernels.backward_query[index],
        over(query_tiles, layout.heads),
        &[
            dqkv,
            dout,
            lse,
            &delta,
            qkv,
            &prefix,
            &span_table.at,
            &query_tiles.at,
            &shape,
        ],
    )
}
