//! Training rows: readers, tokenizer, batches, and the order in which rows are seen.

pub mod batch;
pub mod byte_level;
pub mod cache;
pub mod error;
pub mod positions;
pub mod pretokenised;
pub mod records;
pub mod rows;
pub mod sampler;
pub mod sentencepiece;
pub mod source;
pub mod template;
pub mod text_error;
pub mod text_rows;
pub mod tokenizer;
pub mod training_data;

pub use error::{DataError, RowProblem};
pub use text_error::{FileProblem, TextProblem};
