"""What both sides are given: a model folder with seeded values, an adapter to start from, rows of token ids.

    python workload.py FOLDER [--size mid]          writes all of it, for a look or for a run by hand

The model has the shape of ChatGLM-6B (or GLM-4, for the peer `transformers`) and values of no meaning: time
does not depend on them, and losses can be compared all the same.
"""

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

IGNORED = -100
LORA_R, LORA_ALPHA = 8, 32.0

#: Lengths of a row as questions and answers have them: most are short, a few are long. Prompt and answer are
#: drawn on their own, log-normal by (median, sigma of the logarithm), and cut to (fewest, most) tokens. The
#: figures are this project's model of instruction data, of Chinese alpaca-like sets, not measured on one of them.
PROMPT_TOKENS = (28.0, 0.8, 4, 384)
ANSWER_TOKENS = (72.0, 0.9, 4, 640)


@dataclass(frozen=True)
class Size:
    """A model of the ChatGLM-6B architecture, or of GLM-4's as transformers has it."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_layers: int
    #: Of a uniform batch: rows, tokens of a row, positions of the prefix.
    rows: int = 4
    row_tokens: int = 256
    pre_seq_len: int = 128
    generation: str = "chatglm"
    #: GLM-4 alone.
    key_value_heads: int = 0
    inner_hidden_size: int = 0


SIZES = {
    "tiny": Size(512, 64, 4, 4, row_tokens=32, pre_seq_len=8),
    "mid": Size(32_768, 1_024, 16, 8),
    "chatglm-6b": Size(130_528, 4_096, 32, 28, row_tokens=1_024),
    "chatglm-6b-shallow": Size(130_528, 4_096, 32, 2, row_tokens=256),
    "glm-4-tiny": Size(512, 64, 4, 2, row_tokens=32, generation="glm", key_value_heads=2, inner_hidden_size=128),
    "glm-4-mid": Size(32_768, 1_024, 8, 8, generation="glm", key_value_heads=2, inner_hidden_size=3_424),
    "glm-4-9b": Size(151_552, 4_096, 32, 40, row_tokens=1_024, generation="glm", key_value_heads=2,
                     inner_hidden_size=13_696),
    "glm-4-9b-shallow": Size(151_552, 4_096, 32, 2, generation="glm", key_value_heads=2,
                             inner_hidden_size=13_696),
}


def config_json(size: Size) -> dict:
    """config.json as the published checkpoint has it."""
    if size.generation == "glm":
        head_dim = size.hidden_size // size.num_attention_heads
        return {
            "architectures": ["GlmForCausalLM"], "model_type": "glm", "vocab_size": size.vocab_size,
            "hidden_size": size.hidden_size, "intermediate_size": size.inner_hidden_size,
            "num_attention_heads": size.num_attention_heads, "num_key_value_heads": size.key_value_heads,
            "num_hidden_layers": size.num_layers, "head_dim": head_dim, "partial_rotary_factor": 0.5,
            "rope_theta": 10_000.0, "rms_norm_eps": 1.5625e-7, "attention_bias": True, "hidden_act": "silu",
            "attention_dropout": 0.0, "max_position_embeddings": 8_192, "tie_word_embeddings": False,
            "eos_token_id": size.vocab_size - 5, "pad_token_id": size.vocab_size - 5, "torch_dtype": "float32",
        }
    return {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size, "inner_hidden_size": 4 * size.hidden_size,
        "num_attention_heads": size.num_attention_heads, "num_layers": size.num_layers,
        "layernorm_epsilon": 1e-5, "max_sequence_length": 2_048, "position_encoding_2d": True,
        "bos_token_id": size.vocab_size - 4, "eos_token_id": size.vocab_size - 5,
        "gmask_token_id": size.vocab_size - 6, "mask_token_id": size.vocab_size - 7, "pad_token_id": 3,
        "tie_word_embeddings": True, "torch_dtype": "float32",
    }


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors, weights `[out, in]`."""
    wide = size.hidden_size
    if size.generation == "glm":
        head_dim = wide // size.num_attention_heads
        pairs = size.key_value_heads * head_dim
        found = {"model.embed_tokens.weight": (size.vocab_size, wide), "model.norm.weight": (wide,),
                 "lm_head.weight": (size.vocab_size, wide)}
        for index in range(size.num_layers):
            lead = f"model.layers.{index}"
            for name, rows in {"q_proj": wide, "k_proj": pairs, "v_proj": pairs}.items():
                found[f"{lead}.self_attn.{name}.weight"] = (rows, wide)
                found[f"{lead}.self_attn.{name}.bias"] = (rows,)
            found[f"{lead}.self_attn.o_proj.weight"] = (wide, wide)
            found[f"{lead}.mlp.gate_up_proj.weight"] = (2 * size.inner_hidden_size, wide)
            found[f"{lead}.mlp.down_proj.weight"] = (wide, size.inner_hidden_size)
            found[f"{lead}.input_layernorm.weight"] = (wide,)
            found[f"{lead}.post_attention_layernorm.weight"] = (wide,)
        return found
    found = {"transformer.word_embeddings.weight": (size.vocab_size, wide)}
    norms = ["transformer.final_layernorm"]
    for index in range(size.num_layers):
        lead = f"transformer.layers.{index}"
        linear = {"attention.query_key_value": (3 * wide, wide), "attention.dense": (wide, wide),
                  "mlp.dense_h_to_4h": (4 * wide, wide), "mlp.dense_4h_to_h": (wide, 4 * wide)}
        for name, shape in linear.items():
            found[f"{lead}.{name}.weight"] = shape
            found[f"{lead}.{name}.bias"] = shape[:1]
        norms += [f"{lead}.input_layernorm", f"{lead}.post_attention_layernorm"]
    for norm in norms:
        found[f"{norm}.weight"] = found[f"{norm}.bias"] = (wide,)
    return found


def fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Norms near one, small embeddings and biases, and linear layers that change what passes through them:
    with the small values of a fresh model the loss would hardly depend on attention or adapter."""
    linear = tensor.dim() == 2 and "embed" not in name and "lm_head" not in name
    tensor.normal_(0.0, 2.0 / tensor.shape[1] ** 0.5 if linear else 0.02, generator=generator)
    if "norm" in name and name.endswith(".weight"):
        tensor.add_(1.0)


def write_model(folder: Path, size: Size, dtype: torch.dtype, seed: int) -> None:
    """The model folder, in files of about 2 GiB. Made on the CPU, so that a GPU to be measured stays empty."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(size), indent=1))
    generator = torch.Generator().manual_seed(seed)
    most, held, count, index = 1 << 31, {}, 0, {}
    files = []

    def flush() -> None:
        name = f"model-{len(files) + 1:05}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        files.append(name)
        index.update(dict.fromkeys(held, name))
        held.clear()

    for name, shape in shapes(size).items():
        tensor = torch.empty(shape, dtype=dtype)
        fill(name, tensor, generator)
        held[name] = tensor
        count += tensor.nbytes
        if count >= most:
            flush()
            count = 0
    if held:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def lora_targets(size: Size) -> list[str]:
    """Linear layers that get a LoRA: queries, keys and values."""
    return ["q_proj", "k_proj", "v_proj"] if size.generation == "glm" else ["query_key_value"]


def write_lora(folder: Path, size: Size, seed: int) -> None:
    """A LoRA adapter folder as PEFT writes it. B is not zero, so that A has a gradient from the first step."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(size).items():
        layer = name.removesuffix(".weight")
        if layer == name or layer.rsplit(".", 1)[-1] not in lora_targets(size):
            continue
        rows, columns = shape
        lead = f"base_model.model.{layer}"
        tensors[f"{lead}.lora_A.weight"] = torch.randn(LORA_R, columns, generator=generator) / columns**0.5
        tensors[f"{lead}.lora_B.weight"] = torch.randn(rows, LORA_R, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": LORA_R, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "target_modules": lora_targets(size), "inference_mode": True,
        "base_model_name_or_path": None, "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def write_prefix(folder: Path, size: Size, seed: int) -> None:
    """A P-Tuning v2 prefix, `[pre_seq_len, layers * 2 * hidden]`, under THUDM's name."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shape = (size.pre_seq_len, size.num_layers * 2 * size.hidden_size)
    values = torch.randn(shape, generator=generator) * 0.3
    save_file({"transformer.prefix_encoder.embedding.weight": values}, folder / "prefix.safetensors")
    settings = {"pre_seq_len": size.pre_seq_len, "prefix_projection": False}
    (folder / "config.json").write_text(json.dumps(settings))


def row(size: Size, prompt: int, answer: int, numbers: random.Random) -> dict:
    """A row of `prompt` and `answer` tokens of text; [gMASK] and sop between them, eop at the end.

    Targets are sop, the answer and eop, as in THUDM's training code; of GLM-4 the answer and its end.
    """
    word = lambda: numbers.randrange(4, size.vocab_size - 16)
    question, said = [word() for _ in range(prompt)], [word() for _ in range(answer)]
    end = size.vocab_size - 5
    if size.generation == "glm":
        ids, seen = [*question, *said, end], prompt
    else:
        ids, seen = [*question, size.vocab_size - 6, size.vocab_size - 4, *said, end], prompt + 1
    return {"input_ids": ids, "labels": [IGNORED] * seen + ids[seen:]}


def row_of_length(size: Size, length: int, numbers: random.Random) -> dict:
    """A row whose second half is targets, as `mp-train bench` makes them."""
    half = length // 2
    inside = (half, length - half - 1) if size.generation == "glm" else (half - 1, length - half - 2)
    return row(size, *inside, numbers)


def uniform_rows(size: Size, batches: int, seed: int) -> list[dict]:
    """Rows of one length, half of whose tokens are targets."""
    numbers = random.Random(seed)
    return [row_of_length(size, size.row_tokens, numbers) for _ in range(batches * size.rows)]


def realistic_lengths(size: Size, batches: int, seed: int) -> list[tuple[int, int]]:
    """Tokens of prompt and answer of many rows; of a tiny model an eighth of them."""
    numbers = random.Random(seed)
    shorter = 8 if size.hidden_size < 128 else 1

    def draw(median: float, sigma: float, fewest: int, most: int) -> int:
        drawn = round(median * 2.718281828459045 ** numbers.gauss(0.0, sigma))
        return max(fewest, min(most, drawn) // shorter)

    return [(draw(*PROMPT_TOKENS), draw(*ANSWER_TOKENS)) for _ in range(batches * size.rows)]


def realistic_rows(size: Size, batches: int, seed: int) -> list[dict]:
    """Rows of these lengths."""
    numbers = random.Random(seed + 1)
    return [row(size, *length, numbers) for length in realistic_lengths(size, batches, seed)]


def write_rows(path: Path, rows: list[dict]) -> None:
    """JSONL as mp-train reads it."""
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))


def read_batches(path: Path, rows: int) -> list[list[dict]]:
    """Batches of `rows` rows in file order."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [lines[start : start + rows] for start in range(0, len(lines), rows)]


def about(batches: list[list[dict]]) -> dict:
    """Figures of batches: tokens, targets, and what padding each batch to its longest row would add."""
    lengths = [[len(line["input_ids"]) for line in batch] for batch in batches]
    tokens = sum(map(sum, lengths))
    padded = sum(max(batch) * len(batch) for batch in lengths)
    every = sorted(length for batch in lengths for length in batch)
    targets = sum(label != IGNORED for batch in batches for line in batch for label in line["labels"])
    return {
        "rows": len(every), "tokens": tokens, "targets": targets, "padded_tokens": padded,
        "shortest": every[0], "median": every[len(every) // 2], "longest": every[-1],
    }


def prepare(work: Path, size: Size, dtype: torch.dtype, batches: int) -> dict[str, Path]:
    """Everything that a comparison needs, written once per folder."""
    paths = {"model": work / "model", "lora": work / "lora", "prefix": work / "prefix",
             "uniform": work / "uniform.jsonl", "realistic": work / "realistic.jsonl"}
    stamp = work / "complete.json"
    wanted = json.dumps({**asdict(size), "dtype": str(dtype), "batches": batches, "format": 3})
    if not (stamp.exists() and stamp.read_text() == wanted):
        stamp.unlink(missing_ok=True)
        write_model(paths["model"], size, dtype, 1)
        write_lora(paths["lora"], size, 2)
        if size.generation == "chatglm":
            write_prefix(paths["prefix"], size, 3)
        write_rows(paths["uniform"], uniform_rows(size, batches, 4))
        write_rows(paths["realistic"], realistic_rows(size, batches, 5))
        stamp.write_text(wanted)
    return paths


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("folder", type=Path)
    args.add_argument("--size", choices=SIZES, default="mid")
    args.add_argument("--batches", type=int, default=8)
    args = args.parse_args()
    size = SIZES[args.size]
    args.folder.mkdir(parents=True, exist_ok=True)
    paths = prepare(args.folder, size, torch.float32, args.batches)
    for kind in ["uniform", "realistic"]:
        print(kind, about(read_batches(paths[kind], size.rows)))


if __name__ == "__main__":
    main()
