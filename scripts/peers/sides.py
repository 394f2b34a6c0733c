"""Both sides of a comparison as processes: `mp-train`, and a peer that answers questions."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from workload import LORA_R, Size

HERE = Path(__file__).resolve().parent


class PeerFailed(Exception):
    """A peer ended early; its last words."""


class PeerProcess:
    """A running peer.py."""

    def __init__(self, spec: dict, environment: dict[str, str], log: Path):
        self.log = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, HERE / "peer.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, env=dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", **environment))
        try:
            self.about = self.ask(spec)
        except PeerFailed:
            self.close()
            raise

    def ask(self, question: dict) -> dict:
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            last = Path(self.log.name).read_text().strip().splitlines()[-1:]
            raise PeerFailed(f"ended with {self.process.returncode}: {' '.join(last)} (all of it: {self.log.name})")
        return json.loads(line)

    def steps(self, first: int, count: int) -> dict:
        return self.ask({"do": "steps", "first": first, "count": count})

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclass
class Ours:
    """`mp-train` on the same rows from the same start."""

    program: Path
    work: Path
    device: str
    precision: str
    recompute: str
    threads: int

    def settings(self) -> list[str]:
        device = "cpu" if self.device == "cpu" else "0"
        threads = ["--threads", str(self.threads)] if self.device == "cpu" else []
        return ["--devices", device, "--precision", self.precision, "--recompute", self.recompute, *threads]

    def train(self, model: Path, rows: Path, adapter: str, start: Path, size: Size, learning_rate: float,
              steps: int) -> dict:
        """A whole run of `mp-train train`: per step loss, gradient norm, tokens and seconds.

        The seconds are metrics.jsonl's: a step from taking its rows to its loss and update; neither loading
        nor the writing of checkpoints.
        """
        output = self.work / "run"
        shutil.rmtree(output, ignore_errors=True)
        own = {"lora": ["--lora-dropout", "0"], "prefix": ["--prefix-dropout", "0"]}[adapter]
        command = [
            self.program, "train", "--kind", adapter, "--model", model, "--train", rows, "--shuffle", "false",
            "--init-adapter", start, "--output", output, "--max-steps", steps, "--micro-batch-size", size.rows,
            "--gradient-accumulation", 1, "--lr-schedule", "constant", "--learning-rate", learning_rate,
            "--rotary-table", "f32", "--max-grad-norm", 1.0, "--weight-decay", 0, "--initial-loss-scale", 1024,
            "--quiet", *own, *self.settings(),
        ]
        self.run(command)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        if len(lines) != steps or any(line["skipped"] for line in lines):
            sys.exit(f"{output / 'metrics.jsonl'} does not have {steps} steps that were not skipped")
        shutil.rmtree(output)
        return {
            "losses": [line["loss"] for line in lines], "grad_norms": [line["grad_norm"] for line in lines],
            "tokens": [line["tokens"] for line in lines], "seconds": [line["seconds"] for line in lines],
        }

    def bench(self, name: str, adapter: str, size: Size, lengths: list[int], accumulation: int, warm_up: int,
              steps: int) -> dict:
        """`mp-train bench` with rows of these lengths: seconds and tokens of each counted step, and memory."""
        output = self.work / "bench.json"
        output.unlink(missing_ok=True)
        self.run([
            self.program, "bench", "--size", name, "--adapter", adapter, "--r", LORA_R, "--pre-seq-len",
            size.pre_seq_len, "--micro-batch-size", size.rows, "--gradient-accumulation", accumulation,
            "--lengths", ",".join(map(str, lengths)), "--warm-up", warm_up, "--steps", steps,
            "--profile-steps", 0, "--json", "--output", output, *self.settings(),
        ])
        found = json.loads(output.read_text())
        (layout,) = found["layouts"]
        measured = layout["measured"]
        if measured is None:
            sys.exit(f"mp-train bench measured nothing: {layout['failure']}")
        return {
            "seconds": measured["step_seconds"]["all"], "tokens": [measured["rows"]["tokens"]] * steps,
            "memory": measured["memory"], "mfu": measured["mfu"], "matmul": found["matmul"],
            "machine": found["machine"],
        }

    def run(self, command: list) -> None:
        ended = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if ended.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))}\nended with {ended.returncode}:\n{ended.stderr}")
