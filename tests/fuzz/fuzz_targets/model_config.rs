#![no_main]

use libfuzzer_sys::fuzz_target;
use readers::config::model::ModelConfig;

fuzz_target!(|text: &str| {
    if let Ok(config) = ModelConfig::from_json(text) {
        // What the engine multiplies when it plans.
        let sizes = [config.vocab_size, config.hidden_size, config.num_layers];
        let product = sizes.iter().try_fold(1_usize, |n, &size| n.checked_mul(size));
        assert!(product.is_some(), "{sizes:?}");
    }
});
