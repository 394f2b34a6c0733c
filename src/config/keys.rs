//! The names of all sections and keys; a test of [`super::raw`] holds them and the fields together.

/// Every section with its keys, in the order in which they are printed.
pub(super) const SECTIONS: &[(&str, &[&str])] = &[
    ("model", &["path", "precision"]),
    (
        "adapter",
        &[
            "kind",
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "pre_seq_len",
            "prefix_projection",
            "prefix_dropout",
            "init_adapter",
        ],
    ),
    ("data", &["train", "shuffle"]),
    (
        "optimizer",
        &[
            "learning_rate",
            "lr_schedule",
            "warmup_steps",
            "weight_decay",
            "beta1",
            "beta2",
            "eps",
            "max_grad_norm",
            "loss_normalisation",
            "max_skipped_steps",
        ],
    ),
    (
        "pipeline",
        &[
            "devices",
            "balance",
            "schedule",
            "recompute",
            "threads",
            "memory_per_device",
        ],
    ),
    (
        "run",
        &[
            "output",
            "max_steps",
            "micro_batch_size",
            "gradient_accumulation",
            "save_steps",
            "save_total_limit",
            "seed",
            "resume",
            "log_steps",
        ],
    ),
];
