//! Training rows: readers, batches, and the order in which they are seen.

pub mod batch;
