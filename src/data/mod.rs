//! Training rows: readers, tokenizer, batches, and the order in which rows are seen.

pub mod batch;
pub mod error;
pub mod positions;
pub mod pretokenised;
pub mod rows;
pub mod sampler;
pub mod sentencepiece;
pub mod tokenizer;

pub use error::{DataError, RowProblem};
