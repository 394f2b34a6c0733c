#!/usr/bin/env python3
"""Interoperability with PyTorch, PEFT and transformers, shown and written down in docs/INTEROP.md.

    python3 tests/interop/run.py [--work DIR]

Makes a virtual environment of its own under target/interop (some gigabytes, once), builds mp-train, runs
checks.py with two versions of PEFT and writes the page. Not needed by users, and not part of CI.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NEWER_PEFT = "0.17.1"

def prepare(work: Path) -> tuple[Path, Path]:
    """The environment's Python, and the folder with the newer PEFT."""
    home = work / "venv"
    python = home / "bin" / "python"
    stamp = home / "complete"
    wanted = (HERE / "requirements.txt").read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(home, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", HERE / "requirements.txt"], check=True)
        stamp.write_text(wanted)
    newer = work / f"peft-{NEWER_PEFT}"
    if not newer.exists():
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", newer, f"peft=={NEWER_PEFT}"], check=True)
    return python, newer


def build() -> tuple[Path, Path]:
    """mp-train and the example beside it."""
    cargo = ["cargo", "build", "--release", "--locked", "--bin", "mp-train", "--example", "interop"]
    subprocess.run(cargo, cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    return target / "mp-train", target / "examples" / "interop"


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--work", type=Path, default=ROOT / "target" / "interop")
    args.add_argument("--mp-train", type=Path, help="a built program, with --example")
    args.add_argument("--example", type=Path, help="the built example `interop`")
    args = args.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    python, newer = prepare(args.work)
    program, example = (args.mp_train, args.example) if args.mp_train else build()
    page = (HERE / "lead.md").read_text()
    good = True
    for lead in [None, newer]:
        environment = dict(os.environ, MP_TRAIN=str(program), INTEROP_EXAMPLE=str(example))
        # Whatever the machine has: nothing is fetched, and threads do not change sums.
        environment.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        if lead:
            environment["PYTHONPATH"] = str(lead)
        ran = subprocess.run([python, HERE / "checks.py"], env=environment, stdout=subprocess.PIPE)
        results = [json.loads(line) for line in ran.stdout.decode().splitlines()]
        good &= ran.returncode == 0 and bool(results) and all(row["good"] for row in results)
        versions = next((row["versions"] for row in results if "versions" in row), "nothing")
        page += f"\n### With {versions}\n\n| check | found | limit | |\n| --- | --- | --- | --- |\n"
        for row in results:
            verdict = "pass" if row["good"] else "FAIL"
            page += f"| {row['what']} | {row['found']} | {row['limit']} | {verdict} |\n"
            print(f"{verdict}  {row['what']}: {row['found']} (limit {row['limit']})")
        if ran.returncode != 0:
            page += f"\nThe checks ended early, with code {ran.returncode}.\n"
    (ROOT / "docs" / "INTEROP.md").write_text(page)
    print("all checks passed" if good else "some checks FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
