#!/usr/bin/env python3
"""Seconds of PyTorch's scaled_dot_product_attention, forward and backward, one line of JSON.

    target/peers-venv/bin/python scripts/peers/attention.py --shapes 8x1024,4x2048 --heads 32

For every shape (rows x tokens) and backend: queries, keys and values `[batch, heads, length, head_dim]` of halves
on a GPU (f32 on a CPU), causal. Seconds are of one call, over several runs of several calls each. TFLOP/s count
4 head_dim operations forward and 10 backward for every pair of a query and a key that it sees (FlashAttention-2
computes the scores again), as its authors count. A backend that cannot is listed with its reason.
"""

import argparse
import json
import sys
import time
import warnings
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import machine

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

#: The backend whose figures stand beside mp-train's.
COMPARED = "flash"
#: Those of tests/op_speed.rs.
SHAPES = [(1, 1_024), (16, 512), (8, 1_024), (4, 2_048)]


def seconds_of(call, device: str, runs: int, calls: int) -> list[float]:
    """Seconds of one call in each of `runs` runs of `calls` calls, after a run that is not counted."""
    found = []
    for _ in range(runs + 1):
        if device == "cpu":
            began = time.perf_counter()
            for _ in range(calls):
                call()
            found.append((time.perf_counter() - began) / calls)
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                call()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / calls)
    return found[1:]


def measure(backend: str, batch: int, length: int, args: argparse.Namespace) -> dict:
    """One backend at one shape."""
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    shape = (batch, args.heads, length, args.head_dim)
    generator = torch.Generator(args.device).manual_seed(length)
    query, key, value, gradient = (
        torch.randn(shape, generator=generator, device=args.device, dtype=dtype) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    result = {"backend": backend, "batch": batch, "length": length, "dtype": str(dtype).removeprefix("torch.")}
    try:
        with sdpa_kernel(BACKENDS[backend]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = F.scaled_dot_product_attention(*inputs, is_causal=True)
            result["forward"] = seconds_of(
                lambda: F.scaled_dot_product_attention(*inputs, is_causal=True), args.device, args.runs, args.calls)
            result["backward"] = seconds_of(
                lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True), args.device, args.runs,
                args.calls)
    except RuntimeError as error:
        return result | {"failed": str(error).splitlines()[0]}
    pairs = batch * args.heads * length * (length + 1) / 2
    for way, operations in {"forward": 4, "backward": 10}.items():
        middle = median(result[way])
        result[f"{way}_tflops"] = operations * args.head_dim * pairs / middle / 1e12
    return result


def ops(found: list[dict]) -> list[dict]:
    """The backend that is compared with, under the names that mp-train's own measurements have."""
    timed = [one for one in found if one["backend"] == COMPARED and "backward" in one]
    return [{"op": f"attention {way} {one['batch']}x{one['length']}", "seconds": summary(one[way])}
            for one in timed for way in ("forward", "backward")]


def summary(seconds: list[float]) -> dict:
    return {"all": seconds, "median": median(seconds), "min": min(seconds), "max": max(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--shapes", default=",".join(f"{batch}x{length}" for batch, length in SHAPES),
                        help="rows x tokens of a row, several by commas")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="flash, cudnn, efficient, math")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--calls", type=int, default=20, help="calls of a run")
    parser.add_argument("--output", help="file for the JSON instead of standard output")
    args = parser.parse_args()
    unknown = set(args.backends.split(",")) - BACKENDS.keys()
    if unknown:
        parser.error(f"--backends {','.join(sorted(unknown))}: known are {', '.join(BACKENDS)}")
    shapes = [map(int, shape.split("x")) for shape in args.shapes.split(",")]
    found = [measure(backend, batch, length, args)
             for batch, length in shapes for backend in args.backends.split(",")]
    document = {
        "format": 1, "machine": machine.about(args.device), "torch": torch.__version__, "cuda": torch.version.cuda,
        "backend": COMPARED, "ops": ops(found), "heads": args.heads, "head_dim": args.head_dim, "causal": True,
        "attention": found,
    }
    text = json.dumps(document)
    if args.output:
        with open(args.output, "w") as file:
            file.write(text + "\n")
    else:
        print(text)
    if not any("forward" in one for one in found):
        sys.exit("no backend could be measured")


if __name__ == "__main__":
    main()
