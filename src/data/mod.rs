//! Training rows: readers, batches, and the order in which they are seen.

pub mod batch;
pub mod sentencepiece;
pub mod tokenizer;
