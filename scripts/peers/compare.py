#!/usr/bin/env python3
"""mp-train beside PyTorch: the same losses first, then times by turns, as ratios.

    scripts/peers/setup.sh target/peers-venv
    target/peers-venv/bin/python scripts/peers/compare.py --mp-train target/release/mp-train \\
        --output target/peers-cpu.json --markdown target/peers-cpu.md

`--quick` is a tiny model and two rounds, to see that it works. `--device cuda --size chatglm-6b` measures a GPU
in half precision. `--table FILE.json` writes the Markdown of a run again. docs/PERFORMANCE.md says what is
compared. Exits with 1 when a side's losses differ from the other's; such a comparison is not timed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import machine
import table
import workload
from sides import Ours, PeerFailed, PeerProcess
from workload import SIZES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PARITY_STEPS = 5
LEARNING_RATE = {"lora": 1e-3, "prefix": 1e-2}
#: Largest difference of a loss, and of a gradient norm, over the value. In half precision, with sums in other
#: orders, docs/NUMERICS.md allows 0.05 of a loss of about 10, and 3 % of a norm.
LIMITS = {"float32": (1e-5, 1e-4), "float16": (5e-3, 3e-2)}
#: The sizes that `mp-train bench` knows by other names.
BENCH_NAMES = {"tiny": "tiny", "mid": "small", "chatglm-6b": "chatglm-6b", "glm-4-9b": "glm-4-9b"}
SHALLOW = {"chatglm-6b": "chatglm-6b-shallow", "glm-4-9b": "glm-4-9b-shallow"}
GLM = {"tiny": "glm-4-tiny", "mid": "glm-4-mid", "chatglm-6b": "glm-4-9b"}


@dataclass(frozen=True)
class Comparison:
    """What is trained on which rows, and beside whom."""

    adapter: str
    rows: str
    peers: tuple[str, ...]
    #: Steps of a round that are timed.
    steps: int = 2

    @property
    def name(self) -> str:
        return f"{'glm-4-' if 'transformers' in self.peers else ''}{self.adapter}-{self.rows}"


COMPARISONS = [
    Comparison("lora", "uniform", ("b",)),
    Comparison("prefix", "uniform", ("b",)),
    Comparison("lora", "realistic", ("a",)),
    Comparison("prefix", "realistic", ("a",)),
]
EVERY = [
    Comparison("lora", "uniform", ("a", "b")),
    Comparison("prefix", "uniform", ("a", "b")),
    Comparison("lora", "realistic", ("a", "b")),
    Comparison("prefix", "realistic", ("a", "b")),
    Comparison("lora", "realistic", ("transformers",)),
]


def candidates(device: str, rows: str, quick: bool) -> list[dict]:
    """Ways to run peer (b) that are tried, the plainest first; in a quick run the two ends."""
    way = lambda attention, linear, compiled: {"attention": attention, "linear": linear, "compile": compiled}
    if device == "cpu":
        found = [way("mask", linear, compiled) for compiled in ("none", "blocks") for linear in ("default", "onednn")]
        return found[:: 3 if quick else 1]
    found = [way("mask", "default", "none"), way("split", "default", "none"), way("split", "default", "blocks"),
             way("flex", "default", "blocks")]
    # Compiled as a whole it is compiled again for every batch that has other lengths.
    return found + [way("split", "default", "whole")] * (rows == "uniform")


class Run:
    """All comparisons of one call."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.work = args, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.cuda = args.device != "cpu"
        self.dtype = "float16" if self.cuda else "float32"
        precision = "f16" if self.cuda else "f32"
        self.ours = Ours(args.mp_train.resolve(), self.work, args.device, precision, args.recompute, args.threads)
        # Compiled code is kept from one process to the next, and from run to run.
        self.environment = {"TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor")}
        self.preload = None
        if not self.cuda and not args.plain_mkl:
            self.preload = machine.build_preload(HERE / "mkl_on_amd.c", self.work)
            self.environment |= {"LD_PRELOAD": str(self.preload)} if self.preload else {}

    def size_name(self, comparison: Comparison) -> str:
        return GLM[self.args.size] if "transformers" in comparison.peers else self.args.size

    def paths(self, size: str) -> dict[str, Path]:
        """The folder of a size, in the device's precision."""
        batches = PARITY_STEPS + 3
        return workload.prepare(self.work / size, SIZES[size], getattr(torch, self.dtype), batches)

    def spec(self, comparison: Comparison, peer: str, size: str, paths: dict, options: dict | None,
             synthetic: Path | None = None, accumulation: int = 1) -> dict:
        """What a peer is told; with `synthetic` rows, values are made on the device and no folder is read."""
        return {
            "peer": peer, "device": self.args.device, "threads": self.args.threads, "size": size, "dtype": self.dtype,
            "model": None if synthetic else str(paths["model"]), "rows": str(synthetic or paths[comparison.rows]),
            "adapter": comparison.adapter, "adapter_folder": str(paths[comparison.adapter]),
            "options": options or {}, "recompute": self.args.recompute == "block",
            "learning_rate": LEARNING_RATE[comparison.adapter], "accumulation": accumulation,
        }

    def start(self, spec: dict) -> PeerProcess:
        return PeerProcess(spec, self.environment, self.work / f"peer-{spec['peer']}.log")

    def train(self, comparison: Comparison, size: str, paths: dict, steps: int) -> dict:
        return self.ours.train(paths["model"], paths[comparison.rows], comparison.adapter,
                               paths[comparison.adapter], SIZES[size], LEARNING_RATE[comparison.adapter], steps)

    def compare(self, comparison: Comparison) -> dict:
        say(f"{comparison.name}: mp-train and {', '.join(comparison.peers)}")
        return (self.on_gpu if self.cuda else self.on_cpu)(comparison)

    # On a CPU: the peers stay, and sleep while it is the others' turn ------------------------------------

    def on_cpu(self, comparison: Comparison) -> dict:
        size = self.size_name(comparison)
        paths = self.paths(size)
        peers: dict[str, PeerProcess] = {}
        result = self.outline(comparison, size)
        batches = workload.read_batches(paths[comparison.rows], SIZES[size].rows)
        result["rows"] = workload.about(batches[1 : 1 + comparison.steps])
        try:
            for peer in comparison.peers:
                peers[peer] = self.start(self.spec(comparison, peer, size, paths, None))
                result["peers"][peer] = {"about": peers[peer].about}
            if "b" in peers:
                self.choose(peers["b"], comparison, result["peers"]["b"])
            expected = self.train(comparison, size, paths, PARITY_STEPS)
            for peer, process in peers.items():
                self.agree(result["peers"][peer], expected, process.steps(0, PARITY_STEPS))
                result["peers"][peer]["attention"] = process.ask({"do": "attention"})["kernels"]
            if not self.all_agree(result):
                return result
            # Ours starts anew in every round, so its first step, which touches its memory for the first time, is
            # not counted. The peers have run already.
            def turn(side: str) -> dict:
                if side == "ours":
                    found = self.train(comparison, size, paths, 1 + comparison.steps)
                    return {key: found[key][1:] for key in ("seconds", "tokens")}
                found = peers[side].steps(1, comparison.steps)
                return {key: found[key] for key in ("seconds", "tokens")}

            self.rounds(result, turn)
        finally:
            for process in peers.values():
                process.close()
        return result

    def choose(self, process: PeerProcess, comparison: Comparison, result: dict) -> None:
        """Tries the ways to run peer (b), after steps that compile and warm up, and takes the fastest."""
        tries = []
        # Rows of many lengths are compiled twice: for the first batch as it is, at the second for any length.
        warm_up, steps = (1, 1) if comparison.rows == "uniform" else (2, 2)
        for options in candidates(self.args.device, comparison.rows, self.args.quick):
            process.ask({"do": "options", "options": options})
            seconds = process.steps(0, warm_up + steps)["seconds"][warm_up:]
            tries.append({"options": options, "seconds": seconds})
            say(f"  b, {words(options)}: {sum(seconds):.3f} s")
        self.fastest(tries, result)
        process.ask({"do": "options", "options": result["options"]})

    def fastest(self, tries: list[dict], result: dict) -> None:
        # By the sum: on rows of many lengths the steps differ.
        chosen = min((tried for tried in tries if "seconds" in tried), key=lambda tried: sum(tried["seconds"]))
        result["options"], result["tries"] = chosen["options"], tries
        say(f"  b runs with {words(chosen['options'])}")

    # On a GPU: one process at a time, each with all of its memory ----------------------------------------

    def on_gpu(self, comparison: Comparison) -> dict:
        size = self.size_name(comparison)
        shallow = SHALLOW.get(size, size)
        paths = self.paths(shallow)
        result = self.outline(comparison, size)
        expected = self.train(comparison, shallow, paths, PARITY_STEPS)
        shape, accumulation = SIZES[size], 1 if comparison.rows == "uniform" else 4
        lengths = [shape.row_tokens] * shape.rows
        if comparison.rows == "realistic":
            drawn = workload.realistic_lengths(shape, accumulation, 5)
            lengths = [question + answer + 3 for question, answer in drawn]
        warm_up, steps = 2, max(comparison.steps, 5)
        rows = self.work / f"bench-{comparison.rows}.jsonl"
        numbers = random.Random(6)
        workload.write_rows(rows, [workload.row_of_length(shape, length, numbers)
                                   for _ in range(warm_up + steps) for length in lengths])
        batches = workload.read_batches(rows, shape.rows)
        result["rows"] = workload.about(batches[warm_up * accumulation :])
        # The adapter's start values at full size; the rest of that folder is not made.
        full = {"lora": self.work / f"{size}-lora", "prefix": self.work / f"{size}-prefix"}
        {"lora": workload.write_lora, "prefix": workload.write_prefix}[comparison.adapter](
            full[comparison.adapter], shape, 2)

        def timed(peer: str, options: dict | None) -> dict:
            spec = self.spec(comparison, peer, size, full, options, rows, accumulation)
            with self.start(spec) as process:
                found = process.steps(0, warm_up + steps)
                found["about"] = process.about
            return found

        for peer in comparison.peers:
            own = result["peers"][peer] = {}
            if peer == "b":
                tries = []
                for options in candidates(self.args.device, comparison.rows, self.args.quick):
                    try:
                        tries.append({"options": options, "seconds": timed("b", options)["seconds"][warm_up:]})
                    except PeerFailed as error:
                        tries.append({"options": options, "failed": str(error)})
                self.fastest(tries, own)
            with self.start(self.spec(comparison, peer, shallow, paths, own.get("options"))) as process:
                self.agree(own, expected, process.steps(0, PARITY_STEPS))
                own["attention"] = process.ask({"do": "attention"})["kernels"]
                own["about"] = process.about
        if not self.all_agree(result):
            return result

        def turn(side: str) -> dict:
            if side == "ours":
                return self.ours.bench(BENCH_NAMES[size], comparison.adapter, shape, lengths, accumulation, warm_up,
                                       steps)
            found = timed(side, result["peers"][side].get("options"))
            return {"seconds": found["seconds"][warm_up:], "tokens": found["tokens"][warm_up:],
                    "memory": {key: found[key] for key in ("used_bytes", "peak_allocated_bytes") if key in found}}

        self.rounds(result, turn)
        return result

    # Both ------------------------------------------------------------------------------------------------

    def outline(self, comparison: Comparison, size: str) -> dict:
        shape = SIZES[size]
        return {"name": comparison.name, "adapter": comparison.adapter, "rows_kind": comparison.rows, "size": size,
                "model": workload.config_json(shape), "rows_per_batch": shape.rows, "dtype": self.dtype,
                "pre_seq_len": shape.pre_seq_len if comparison.adapter == "prefix" else None,
                "recompute": self.args.recompute, "peers": {}, "rounds": []}

    def agree(self, result: dict, expected: dict, found: dict) -> None:
        """Losses and gradient norms of the first steps beside ours."""
        far = lambda key: max(abs(a - b) / max(abs(a), abs(b)) for a, b in zip(expected[key], found[key], strict=True))
        limits = LIMITS[self.dtype]
        parity = {"steps": PARITY_STEPS, "ours": pick(expected), "peer": pick(found), "limits": limits,
                  "loss_difference": far("losses"), "grad_norm_difference": far("grad_norms")}
        parity["agree"] = parity["loss_difference"] <= limits[0] and parity["grad_norm_difference"] <= limits[1]
        result["parity"] = parity
        say(f"  first {PARITY_STEPS} losses within {parity['loss_difference']:.1e}, gradient norms within "
            f"{parity['grad_norm_difference']:.1e}: {'the same' if parity['agree'] else 'NOT the same'}")

    def all_agree(self, result: dict) -> bool:
        return all(peer["parity"]["agree"] for peer in result["peers"].values())

    def rounds(self, result: dict, turn) -> None:
        """Every side once per round, in turns that change direction from round to round."""
        sides = ["ours", *result["peers"]]
        for index in range(self.args.rounds):
            this = {side: turn(side) for side in (sides if index % 2 == 0 else sides[::-1])}
            totals = {side: (sum(found["seconds"]), sum(found["tokens"])) for side, found in this.items()}
            if len({tokens for _, tokens in totals.values()}) != 1:
                sys.exit(f"{result['name']}: the sides have not trained the same tokens: {totals}")
            this["load"] = os.getloadavg()[0]
            result["rounds"].append(this)
            say(f"  round {index + 1}: " + ", ".join(
                f"{side} {seconds:.3f} s ({tokens / seconds:.0f} tokens/s)"
                for side, (seconds, tokens) in totals.items()))
        result["summary"] = table.summary(result)
        for peer, found in result["summary"]["ratios"].items():
            say(f"  ours / {peer}: {found['median']:.3f} of the time ({found['min']:.3f} to {found['max']:.3f})")


def pick(found: dict) -> dict:
    return {key: found[key] for key in ("losses", "grad_norms")}


def words(options: dict) -> str:
    return f"attention {options['attention']}, products {options['linear']}, compiled {options['compile']}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mp-train", type=Path, help="the program, built for release")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--size", choices=BENCH_NAMES, help="mid (default), tiny, chatglm-6b")
    parser.add_argument("--comparisons", default="default", help="such as lora-uniform,prefix-realistic:a; all")
    parser.add_argument("--rounds", type=int, help="times every side is measured (5)")
    parser.add_argument("--recompute", choices=["none", "block"], default="none", help="on both sides (none)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a CPU, on both sides")
    parser.add_argument("--plain-mkl", action="store_true", help="without the library that lets MKL use AVX-512")
    parser.add_argument("--quick", action="store_true", help="tiny model, two rounds, every comparison")
    parser.add_argument("--work", type=Path, default=ROOT / "target" / "peers", help="folder for models and rows")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--markdown", type=Path, help="the same as a page")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="make the page from a run of before")
    args = parser.parse_args()
    if args.table is None and args.mp_train is None:
        parser.error("--mp-train says which program to measure")
    if args.table is None and args.output is None:
        parser.error("--output says where the JSON goes")
    args.size = args.size or ("tiny" if args.quick else "mid" if args.device == "cpu" else "chatglm-6b")
    args.rounds = args.rounds or (2 if args.quick else 5)
    return args


def chosen(args: argparse.Namespace) -> list[Comparison]:
    """The comparisons asked for."""
    names = args.comparisons.split(",")
    if names == ["default"]:
        # On a GPU a step is short, and the two peers belong together.
        return EVERY if args.quick or args.device != "cpu" else COMPARISONS
    if names == ["all"]:
        return EVERY
    known = {comparison.name: comparison for comparison in EVERY}
    found = []
    for name in names:
        name, *peers = name.split(":")
        if name not in known or not set(peers) <= set(known[name].peers):
            sys.exit(f"--comparisons {':'.join([name, *peers])}: known are "
                     + ", ".join(":".join([name, *comparison.peers]) for name, comparison in known.items()))
        found.append(replace(known[name], peers=tuple(peers) or known[name].peers))
    return found


def main() -> int:
    args = arguments()
    if args.table is None:
        run = Run(args)
        document = {"format": 1, "machine": machine.about(args.device), "commit": machine.commit(ROOT),
                    "program": machine.program(args.mp_train), "command": machine.without_folders(sys.argv[1:]),
                    "threads": args.threads, "mkl_preload": run.preload is not None, "comparisons": []}
        for comparison in chosen(args):
            document["comparisons"].append(run.compare(comparison))
            # What is measured is kept, whatever comes after it.
            args.output.write_text(json.dumps(document, indent=1) + "\n")
    else:
        document = json.loads(args.table.read_text())
    if args.markdown:
        args.markdown.write_text(table.page(document))
    else:
        print(table.page(document), flush=True)
    for comparison in document["comparisons"]:
        for peer, found in comparison.get("summary", {"ratios": {}})["ratios"].items():
            say(f"{comparison['name']}: {found['median']:.3f} of the time of peer {peer}, "
                f"{1 / found['median']:.2f} times its tokens per second")
    good = all("summary" in comparison for comparison in document["comparisons"])
    if not good:
        say("what does not agree was not timed")
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (PeerFailed, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
