//! How device memory is taken, and filled from the host.

/// Bytes of a piece of [`Backend::upload_pieces`](super::Backend::upload_pieces): much longer than a copy takes to start, and small
/// beside any model.
pub const PIECE_BYTES: usize = 1 << 20;

/// Values of a piece: as many whole units of `unit` values as [`PIECE_BYTES`] has room for, or one.
pub(super) fn piece_len<T>(unit: usize) -> usize {
    let unit = unit.max(1);
    let fitting = PIECE_BYTES / size_of::<T>().max(1);
    (fitting / unit).max(1) * unit
}

/// What a backend was told to take of its device, and what became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes taken at once when the run started.
    pub planned: u64,
    /// Bytes of them that buffers lie in, at the most.
    pub used: u64,
    /// Bytes of buffers that had no room there, so far.
    pub beside: u64,
}
