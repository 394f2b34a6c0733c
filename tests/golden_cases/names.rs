//! One vocabulary for the tensors of all families: what a family calls otherwise goes by the name that
//! the harness has for it.

use super::manifest::{Entry, Form};

/// The name under which the harness finds, compares and limits a stored tensor.
pub fn known(form: Form, entry: &Entry, stored: &str) -> String {
    match form {
        Form::Named => match stored.strip_prefix("final.") {
            Some(tensor) => format!("train.final.{tensor}"),
            None => stored.to_owned(),
        },
        Form::Listed => listed(entry, stored),
    }
}

fn listed(entry: &Entry, stored: &str) -> String {
    let case = &entry.name[..];
    match stored {
        "micro_input_ids" => return "train.input_ids".to_owned(),
        "micro_labels" => return "train.labels".to_owned(),
        "micro_attention_mask" => return "train.attention_mask".to_owned(),
        "final_norm" => return "hidden.final_norm".to_owned(),
        "prefix_key_values" => return "prefix_key_value".to_owned(),
        _ => {}
    }
    if let Some(states) = stored.strip_prefix("hidden_states.") {
        // The embedding's output, then that of each block.
        return match states.parse() {
            Ok(0) => "hidden.embedding".to_owned(),
            Ok(index) => block_output(index - 1),
            Err(_) => stored.to_owned(),
        };
    }
    if case == "layer_trace" && stored != "input_ids" {
        let layer = &entry.settings["layer_index"];
        return format!("layer{layer}.{}", inside_block(stored));
    }
    if case.starts_with("lora_train") || case.starts_with("ptuning_train") {
        let (head, _) = stored.split_once('.').unwrap_or((stored, ""));
        let of_the_run = [
            "lr",
            "lr_reported_after_step",
            "loss",
            "micro_loss",
            "grad_norm",
            "final",
        ];
        if of_the_run.contains(&head) {
            return format!("train.{stored}");
        }
    }
    if case.starts_with("quant_") {
        return quantised(stored);
    }
    stored.to_owned()
}

/// Output of block `layer`.
pub fn block_output(layer: usize) -> String {
    format!("hidden.block_{layer:02}")
}

fn inside_block(stored: &str) -> &str {
    match stored {
        "layer_input" => "input",
        "input_norm" => "input_layernorm",
        "value_expanded" => "value",
        "attention_dense" | "o_proj" => "attention_output",
        "after_first_residual" => "sum",
        "post_attention_norm" => "post_attention_layernorm",
        "dense_h_to_4h" | "gate_up_proj" => "inner",
        "swiglu" => "activated",
        "layer_output" => "output",
        other => other,
    }
}

/// What stands under `quantized.` are the checkpoint's own names; runs with a prefix, and without the
/// rounding of weights, go under a lead.
fn quantised(stored: &str) -> String {
    if let Some(tensor) = stored.strip_prefix("quantized.") {
        return tensor.to_owned();
    }
    if let Some(rest) = stored.strip_prefix("float32_dequant.") {
        return format!("unrounded.{}", quantised(rest));
    }
    match stored.strip_prefix("prefix_") {
        Some(rest) => format!("ptuning.{rest}"),
        None => stored.to_owned(),
    }
}
