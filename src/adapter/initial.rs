//! How trainable tensors start when no file gives their values.

use super::{ParameterSpec, Role};
use crate::random::{Domain, Key};

/// Values of `spec`, or of its slice where it is a part of a tensor, from the seed and the tensor's name.
/// Those of a slice are what the whole tensor has there, and only they are made.
///
/// As PEFT and PyTorch do it: `lora_A` Kaiming-uniform with a = sqrt(5), which is uniform in
/// ±1/sqrt(I); `lora_B` zero; the prefix embedding N(0, 1); projection layers uniform in
/// ±1/sqrt(in_features). `None` for a tensor of the base model, which comes from its file.
pub fn initial_values(spec: &ParameterSpec, seed: u64) -> Option<Vec<f32>> {
    let key = |domain| {
        let name = spec.name.bytes();
        name.fold(Key::new(seed, domain), |key, byte| {
            key.fold(u64::from(byte))
        })
    };
    let uniform = |key: Key, in_features: usize| {
        let bound = 1.0 / (in_features as f32).sqrt();
        spec.filled(|first, values| {
            let mut stream = key.stream_from(first as u64);
            values.fill_with(|| (2.0 * stream.uniform() - 1.0) * bound);
        })
    };
    match spec.role {
        Role::LoraA => Some(uniform(key(Domain::LoraInit), spec.shape[1])),
        Role::LoraB => Some(vec![0.0; spec.len()]),
        Role::PrefixEmbedding => {
            let key = key(Domain::PrefixInit);
            Some(spec.filled(|first, values| {
                // Two words make a normal number.
                let mut stream = key.stream_from(2 * first as u64);
                values.fill_with(|| stream.normal());
            }))
        }
        Role::PrefixProjection { in_features } => {
            Some(uniform(key(Domain::PrefixInit), in_features))
        }
        Role::Base => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::Slice;
    use super::*;

    #[test]
    fn a_part_starts_as_the_whole_does_there() {
        for role in [
            Role::PrefixEmbedding,
            Role::PrefixProjection { in_features: 5 },
        ] {
            for (axis, start, len) in [(0, 3, 4), (1, 1, 3), (1, 0, 5), (0, 0, 1)] {
                let whole = ParameterSpec {
                    name: "prefix_encoder.trans.2.weight".to_owned(),
                    shape: vec![7, 5],
                    slice: None,
                    decay: true,
                    role,
                };
                let part = ParameterSpec {
                    slice: Some(Slice { axis, start, len }),
                    ..whole.clone()
                };
                let values = initial_values(&whole, 9).unwrap();
                assert_eq!(values.len(), 35);
                assert_eq!(
                    initial_values(&part, 9).unwrap(),
                    part.cut(&values),
                    "{role:?} {axis} {start} {len}"
                );
            }
        }
    }
}
