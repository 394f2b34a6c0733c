//! Training rows: readers, batches, and the order in which they are seen.

pub mod batch;
pub mod error;
pub mod positions;
pub mod pretokenised;
pub mod rows;
pub mod sampler;

pub use error::{DataError, RowProblem};
pub mod sentencepiece;
pub mod tokenizer;
