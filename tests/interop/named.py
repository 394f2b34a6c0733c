"""ChatGLM-6B and ChatGLM2-6B by the names of their layers: adapters and prefixes, both ways."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from common import Tree, close, equal, export, tell, train

CONFIGS = {
    "ChatGLM-6B": {
        "model_type": "chatglm", "vocab_size": 90, "hidden_size": 32, "inner_hidden_size": 72,
        "num_attention_heads": 2, "num_layers": 3, "max_sequence_length": 64, "bos_token_id": 84,
        "eos_token_id": 85, "mask_token_id": 80, "gmask_token_id": 81, "pad_token_id": 3,
        "tie_word_embeddings": False, "position_encoding_2d": True, "torch_dtype": "float32",
    },
    "ChatGLM2-6B": {
        "model_type": "chatglm", "num_layers": 3, "padded_vocab_size": 90, "hidden_size": 32,
        "ffn_hidden_size": 44, "kv_channels": 16, "num_attention_heads": 2,
        "multi_query_attention": True, "multi_query_group_num": 1, "seq_length": 64,
        "layernorm_epsilon": 1e-5, "rmsnorm": True, "post_layer_norm": True,
        "add_bias_linear": False, "add_qkv_bias": True, "original_rope": True,
        "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": False,
        "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32",
    },
}
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def shapes(generation: str) -> dict[str, list[int]]:
    """Names and shapes of the model's tensors."""
    if generation == "ChatGLM-6B":
        layers, attention, wide = "transformer.layers", "attention", 96
        found = {"transformer.word_embeddings.weight": [90, 32], "lm_head.weight": [90, 32]}
        final = "transformer.final_layernorm"
        inner, gated = 72, 72
    else:
        layers, attention, wide = "transformer.encoder.layers", "self_attention", 64
        found = {"transformer.embedding.word_embeddings.weight": [90, 32],
                 "transformer.output_layer.weight": [90, 32]}
        final = "transformer.encoder.final_layernorm"
        inner, gated = 44, 88
    for layer in range(3):
        lead = f"{layers}.{layer}"
        linear = {f"{lead}.{attention}.query_key_value": [wide, 32], f"{lead}.{attention}.dense": [32, 32],
                  f"{lead}.mlp.dense_h_to_4h": [gated, 32], f"{lead}.mlp.dense_4h_to_h": [32, inner]}
        found |= {f"{name}.weight": shape for name, shape in linear.items()}
        biased = linear if generation == "ChatGLM-6B" else {f"{lead}.{attention}.query_key_value": [wide]}
        found |= {f"{name}.bias": shape[:1] for name, shape in biased.items()}
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            found[f"{lead}.{norm}.weight"] = [32]
    found[f"{final}.weight"] = [32]
    if generation == "ChatGLM-6B":
        norms = [name for name in found if "layernorm.weight" in name]
        found |= {name.replace("weight", "bias"): [32] for name in norms}
    return found


def make(work: Path, generation: str) -> tuple[Path, Path]:
    """A model folder and rows to train on."""
    model = work / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(CONFIGS[generation], indent=2))
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in shapes(generation).items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    rows = work / "rows.jsonl"
    tail = [81, 84] if generation == "ChatGLM-6B" else [5, 6]
    lines = []
    for i in range(8):
        prompt = [10 + (i * 7 + j * 3) % 60 for j in range(5)] + tail
        answer = [10 + (i * 5 + j) % 60 for j in range(6)]
        row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        lines.append(json.dumps(row))
    rows.write_text("\n".join(lines))
    return model, rows


def deltas(model) -> dict[str, torch.Tensor]:
    """What an adapter in PEFT adds to each weight."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach()
    return found


def random_lora(model: Path, **settings):
    """An adapter made by PEFT, with a B that is not zero."""
    made = get_peft_model(Tree(model), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def loaded(model: Path, folder: Path):
    """What PeftModel makes of a folder, and whether it found every tensor of it at its place."""
    found = PeftModel.from_pretrained(Tree(model), folder)
    in_file = load_file(folder / "adapter_model.safetensors")
    state = {name: tensor for name, tensor in found.state_dict().items() if "lora_" in name}
    plain = {name.replace(".default.", "."): tensor for name, tensor in state.items()}
    same = plain.keys() == in_file.keys() and all(torch.equal(plain[n], in_file[n]) for n in plain)
    return found, same and bool(plain)


def check(work: Path, generation: str) -> None:
    model, rows = make(work, generation)
    ours(work, generation, model, rows)
    theirs(work, generation, model)
    prefixes(work, generation, model, rows)


def ours(work: Path, generation: str, model: Path, rows: Path) -> None:
    """LoRA trained here, loaded there."""
    adapter = train(model, rows, work / "lora", "--r", 4, "--lora-alpha", 16,
                    "--target-modules", ",".join(TARGETS))
    found, complete = loaded(model, adapter)
    added = deltas(found)
    tell(f"{generation}: LoRA trained here, PeftModel.from_pretrained", f"{len(added)} layers",
         "12, every tensor at its place", len(added) == 12 and complete)
    tensors = load_file(adapter / "adapter_model.safetensors")
    by_hand = []
    inputs = []
    for name, delta in added.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        by_hand.append((delta, 16 / 4 * b @ a))
        layer = found.base_model.model.get_submodule(name)
        x = torch.randn(5, a.shape[1])
        bare = torch.nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
        inputs.append((layer(x), bare + x @ (16 / 4 * b @ a).T))
    close(f"{generation}: its deltas, alpha / r B A", by_hand, 1e-6)
    close(f"{generation}: outputs of its layers", inputs, 1e-5)
    merged = load_file(export(model, work / "merged", adapter=adapter) / "model.safetensors")
    expected = found.merge_and_unload().state_dict()
    close(f"{generation}: mp-train export against merge_and_unload",
          [(merged[name], expected[name]) for name in expected], 1e-6)


def theirs(work: Path, generation: str, model: Path) -> None:
    """LoRA made there in all its forms, read here and written again."""
    lead = "attention" if generation == "ChatGLM-6B" else "self_attention"
    forms = {
        "plain": dict(r=4, lora_alpha=16, target_modules=TARGETS),
        "use_rslora": dict(r=4, lora_alpha=16, target_modules=TARGETS, use_rslora=True),
        "rank_pattern and alpha_pattern": dict(
            r=4, lora_alpha=16, target_modules=TARGETS,
            rank_pattern={"mlp.dense_h_to_4h": 7, f"layers.1.{lead}.dense": 2},
            alpha_pattern={"mlp.dense_h_to_4h": 5, f"layers.1.{lead}.dense": 3}),
        "target_modules as a pattern": dict(
            r=4, lora_alpha=16, target_modules=r".*layers\.[02]\.mlp\.dense_(h_to_4h|4h_to_h)"),
        "layers_to_transform": dict(r=4, lora_alpha=16, target_modules=TARGETS, layers_to_transform=[1]),
    }
    for form, settings in forms.items():
        for safe in [True, False]:
            file = "adapter_model.safetensors" if safe else "adapter_model.bin"
            folder = work / f"peft-{len(list(work.iterdir()))}"
            made = random_lora(model, **settings)
            made.save_pretrained(folder, safe_serialization=safe)
            expected = deltas(made)
            again = export(model, Path(f"{folder}-again"), "--format", "peft", adapter=folder)
            found, complete = loaded(model, again)
            found = deltas(found)
            what = f"{generation}: LoRA of PEFT ({form}, {file}), read and written here, loaded again"
            if found.keys() != expected.keys() or not complete:
                tell(what, f"{len(found)} layers", len(expected), False)
                continue
            close(what, [(found[name], expected[name]) for name in expected], 1e-6)
            merged = export(model, Path(f"{folder}-merged"), adapter=folder)
            weights = load_file(merged / "model.safetensors")
            unloaded = made.merge_and_unload().state_dict()
            close(f"{generation}: the same ({form}), merged here and there",
                  [(weights[name], unloaded[name]) for name in unloaded], 1e-6)


def prefixes(work: Path, generation: str, model: Path, rows: Path) -> None:
    """P-Tuning v2 checkpoints, both ways."""
    lead = "transformer.prefix_encoder."
    for projection in [False, True]:
        form = "with projection" if projection else "plain"
        folder = train(model, rows, work / f"prefix-{projection}", "--kind", "prefix", "--pre-seq-len", 6,
                       "--prefix-projection", str(projection).lower())
        ours = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
        beside = load_file(folder / "prefix.safetensors")
        config = json.loads((folder / "config.json").read_text())
        said = (config["pre_seq_len"], config["prefix_projection"]) == (6, projection)
        equal(f"{generation}: prefix trained here ({form}), torch.load(weights_only=True)",
              [(ours[name], tensor) for name, tensor in beside.items()])
        tell(f"{generation}: its names and config.json", f"{len(ours)} tensors", "as THUDM's",
             said and all(name.startswith(lead) for name in ours) and len(ours) == (5 if projection else 1))
        # As THUDM's Trainer saves it, in the zip form and in the older one.
        for zipped in [True, False]:
            theirs = {name: torch.randn_like(tensor) for name, tensor in ours.items()}
            made = work / f"thudm-{projection}-{zipped}" / "checkpoint-3000"
            made.mkdir(parents=True)
            torch.save(theirs, made / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
            (made / "config.json").write_text(json.dumps(config))
            again = export(model, made.parent / "again", adapter=made)
            found = torch.load(again / "pytorch_model.bin", weights_only=True, map_location="cpu")
            form_of_file = "zip" if zipped else "older form"
            equal(f"{generation}: prefix of torch.save ({form}, {form_of_file}), read and written here",
                  [(found[name], tensor) for name, tensor in theirs.items()])
