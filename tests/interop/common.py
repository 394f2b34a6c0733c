"""What the checks share: running mp-train, telling results, tiny trees of linear layers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

PROGRAM = os.environ["MP_TRAIN"]
EXAMPLE = os.environ["INTEROP_EXAMPLE"]
VERSIONS = []


def tell(what: str, found, limit, good: bool) -> None:
    """One result, as a line of JSON."""
    row = {"what": what, "found": str(found), "limit": str(limit), "good": bool(good)}
    if VERSIONS:
        row["versions"] = VERSIONS[0]
    print(json.dumps(row), flush=True)


def close(what: str, pairs, limit: float) -> None:
    """Tensors by twos that must not differ by more than `limit`; none at all is a failure."""
    pairs = [(a.double(), b.double()) for a, b in pairs]
    if any(a.shape != b.shape for a, b in pairs) or not pairs:
        shapes = [(tuple(a.shape), tuple(b.shape)) for a, b in pairs]
        tell(what, f"shapes {shapes[:3]}", limit, False)
        return
    worst = max((a - b).abs().max().item() for a, b in pairs)
    tell(what, f"{worst:.1e}", f"{limit:.0e}", worst <= limit)


def equal(what: str, pairs) -> None:
    """Tensors by twos that must be equal to the bit, type and shape included."""
    pairs = list(pairs)
    same = [a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs]
    tell(what, f"{sum(same)} of {len(same)} tensors equal", "all", bool(same) and all(same))


def differ(what: str, one, other, least: float) -> None:
    """The adapter changes something, so that a comparison says something."""
    worst = max((a - b).abs().max().item() for a, b in zip(one, other))
    tell(what, f"{worst:.1e}", f"at least {least:.0e}", worst >= least)


def run(program: str, *args) -> None:
    """Runs a command that must succeed."""
    ended = subprocess.run([program, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if ended.returncode != 0:
        sys.exit(f"{[program, *map(str, args)]} ended with {ended.returncode}: {ended.stderr.decode()}")


def export(model: Path, output: Path, *flags, adapter: Path | None = None) -> Path:
    """`mp-train export`; returns the new folder."""
    adapter_flags = ["--adapter", adapter] if adapter else []
    run(PROGRAM, "export", "--model", model, "--output", output, *adapter_flags, *flags)
    return output


def train(model: Path, rows: Path, output: Path, *flags) -> Path:
    """A short `mp-train train`; returns the adapter's or the model's folder."""
    settings = ["--max-steps", 12, "--lr-schedule", "constant"]
    if "--learning-rate" not in flags:
        settings += ["--learning-rate", 0.01]
    run(PROGRAM, "train", "--model", model, "--train", rows, "--output", output, "--quiet",
        "--devices", "cpu,cpu", "--micro-batch-size", 2, "--gradient-accumulation", 2, *settings, *flags)
    adapter = output / "adapter"
    return adapter if adapter.exists() else output / "model"


class Tree(torch.nn.Module):
    """The linear layers of a model folder under their names, with what PeftModel asks of a base."""

    def __init__(self, folder: Path):
        super().__init__()
        tensors = load_file(folder / "model.safetensors")
        weights = {name: t for name, t in tensors.items() if name.endswith(".weight") and t.dim() == 2}
        for name, weight in weights.items():
            *path, last = name.removesuffix(".weight").split(".")
            parent = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, torch.nn.Module())
                parent = parent._modules[part]
            bias = tensors.get(name.removesuffix("weight") + "bias")
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            linear.weight = torch.nn.Parameter(weight.float())
            if bias is not None:
                linear.bias = torch.nn.Parameter(bias.float())
            parent.add_module(last, linear)
        self.config = {"model_type": "custom", "tie_word_embeddings": False}

    def prepare_inputs_for_generation(self, *args, **kwargs):
        raise NotImplementedError

    def forward(self, x):
        raise NotImplementedError
