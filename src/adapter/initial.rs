//! How trainable tensors start when no file gives their values.

use super::{ParameterSpec, Role};
use crate::random::{Domain, Key};

/// Values of the whole tensor of `spec` (not of its slice), from the seed and the tensor's name.
///
/// As PEFT and PyTorch do it: `lora_A` Kaiming-uniform with a = sqrt(5), which is uniform in
/// ±1/sqrt(I); `lora_B` zero; the prefix embedding N(0, 1); projection layers uniform in
/// ±1/sqrt(in_features). `None` for a tensor of the base model, which comes from its file.
pub fn initial_values(spec: &ParameterSpec, seed: u64) -> Option<Vec<f32>> {
    let len: usize = spec.shape.iter().product();
    let key = |domain| {
        let name = spec.name.bytes();
        name.fold(Key::new(seed, domain), |key, byte| {
            key.fold(u64::from(byte))
        })
    };
    let uniform = |key: Key, in_features: usize| {
        let bound = 1.0 / (in_features as f32).sqrt();
        let mut stream = key.stream();
        (0..len)
            .map(|_| (2.0 * stream.uniform() - 1.0) * bound)
            .collect()
    };
    match spec.role {
        Role::LoraA => Some(uniform(key(Domain::LoraInit), spec.shape[1])),
        Role::LoraB => Some(vec![0.0; len]),
        Role::PrefixEmbedding => {
            let mut stream = key(Domain::PrefixInit).stream();
            Some((0..len).map(|_| stream.normal()).collect())
        }
        Role::PrefixProjection { in_features } => {
            Some(uniform(key(Domain::PrefixInit), in_features))
        }
        Role::Base => None,
    }
}
