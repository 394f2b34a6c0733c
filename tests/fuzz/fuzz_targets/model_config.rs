#![no_main]

use libfuzzer_sys::fuzz_target;
use mp_train::config::model::ModelConfig;
use mp_train::model::weights::model_tensors;

fuzz_target!(|text: &str| {
    if let Ok(config) = ModelConfig::from_json(text)
        && config.num_layers < 100
    {
        // Sizes multiply without overflow.
        for (name, shape) in model_tensors(&config) {
            let count = shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
            assert!(count.is_some(), "{name} {shape:?}");
        }
    }
});
