//! Which tensor goes into which file, and the index that says so.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::CheckpointError;
use crate::checkpoint::run_state::write_json;
use crate::checkpoint::safetensors::PlannedTensor;

/// The index beside more than one file.
const INDEX: &str = "model.safetensors.index.json";

/// Bytes of a tensor's elements.
pub fn bytes(tensor: &PlannedTensor) -> u64 {
    tensor.dtype.bytes_of(&tensor.shape).unwrap_or(usize::MAX) as u64
}

/// Deals tensors out to files of at most `most` bytes, in their order; a larger tensor gets a file of
/// its own.
pub fn deal(tensors: Vec<PlannedTensor>, most: u64) -> Vec<Vec<PlannedTensor>> {
    let mut shards: Vec<Vec<PlannedTensor>> = Vec::new();
    let mut filled = 0_u64;
    for tensor in tensors {
        let size = bytes(&tensor);
        match shards.last_mut() {
            Some(shard) if filled.saturating_add(size) <= most => {
                shard.push(tensor);
                filled += size;
            }
            _ => {
                shards.push(vec![tensor]);
                filled = size;
            }
        }
    }
    shards
}

/// Name of file `index` of `count`.
pub fn name(index: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    }
}

/// Writes the index of several files; one needs none.
///
/// # Errors
/// It cannot be written.
pub fn write_index(folder: &Path, shards: &[Vec<PlannedTensor>]) -> Result<(), CheckpointError> {
    if shards.len() < 2 {
        return Ok(());
    }
    let mut places: Vec<(&str, String)> = Vec::new();
    for (index, shard) in shards.iter().enumerate() {
        let file = name(index, shards.len());
        places.extend(shard.iter().map(|tensor| (&*tensor.name, file.clone())));
    }
    places.sort();
    let map = places
        .into_iter()
        .map(|(name, file)| (name.to_owned(), json!(file)));
    let total: u64 = shards.iter().flatten().map(bytes).sum();
    let index = json!({
        "metadata": { "total_size": total },
        "weight_map": Value::Object(map.collect::<Map<String, Value>>()),
    });
    write_json(&folder.join(INDEX), &index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Dtype;

    fn tensor(name: &str, halves: usize) -> PlannedTensor {
        PlannedTensor {
            name: name.to_owned(),
            dtype: Dtype::F16,
            shape: vec![halves],
        }
    }

    #[test]
    fn files_are_filled_in_order_and_never_beyond_their_size() {
        let tensors = [3, 2, 7, 1, 1, 3]
            .map(|halves| tensor("t", halves))
            .to_vec();
        let sizes = |most: u64| -> Vec<Vec<u64>> {
            let shards = deal(tensors.clone(), most);
            shards
                .iter()
                .map(|shard| shard.iter().map(bytes).collect())
                .collect()
        };
        // Seven halves alone are more than ten bytes.
        assert_eq!(sizes(10), [vec![6, 4], vec![14], vec![2, 2, 6]]);
        assert_eq!(sizes(1).len(), 6);
        assert_eq!(sizes(34).len(), 1);
        assert_eq!(sizes(33).len(), 2);
        assert!(deal(Vec::new(), 10).is_empty());
    }

    #[test]
    fn names_are_those_of_transformers() {
        assert_eq!(name(0, 1), "model.safetensors");
        assert_eq!(name(6, 12), "model-00007-of-00012.safetensors");
    }
}
