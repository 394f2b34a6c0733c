"""What the issue of speed asks of a GPU, out of what scripts/check_gpu.sh measured.

    gpu_speed.py ops OPS.json                     rates of products and copies, and each op's share of them
    gpu_speed.py attention OPS.json SDPA.json     our attention beside PyTorch's, of scripts/peers/attention.py
    gpu_speed.py mfu BENCH.json                   share of the measured rate of products
    gpu_speed.py stages ONE.json TWO.json ..      tokens per second of several stages on a card beside one stage
    gpu_speed.py memory LIMIT BEFORE USED BENCH.json    rise of used memory, from readings of nvidia-smi in MiB

Each prints a line for people, then a line of JSON. A figure has what was found, what is asked for, and
whether that is met. Standard library only.
"""

import json
import sys
from pathlib import Path

MFU_AT_LEAST = 0.65
OF_SDPA_AT_LEAST = 0.70
OF_ONE_STAGE_AT_LEAST = 0.95


def read(path):
    return json.loads(Path(path).read_text())


def figure(name, found, asked, at_least=True):
    return {
        "figure": name,
        "found": round(found, 4),
        "at_least" if at_least else "at_most": asked,
        "met": found >= asked if at_least else found <= asked,
    }


def said(figures):
    """Figures as a line: what was missed first."""
    texts = []
    for f in sorted(figures, key=lambda f: f["met"]):
        asked = f"at least {f['at_least']}" if "at_least" in f else f"at most {f['at_most']}"
        texts.append(f"{'' if f['met'] else 'MISSED '}{f['figure']} {f['found']} ({asked})")
    return "; ".join(texts)


def ops(path):
    results = read(path)
    note = f"products {results['product_tflops']:.1f} TFLOP/s, copies {results['copy_gbytes_per_second']:.0f} GB/s"
    memory = [op for op in results["ops"] if op["bound"] == "memory"]
    slowest = min(memory, key=lambda op: op["share"])
    note += f"; of {len(memory)} ops on memory the slowest is {slowest['op']} at {slowest['share']:.2f} of a copy"
    return note, results


def attention(ours_path, peer_path):
    """Beside the kernel that scripts/peers/attention.py compares with, at the shapes that are in both."""
    own = {op["op"]: op["seconds"] for op in read(ours_path)["ops"] if op["bound"] == "attention"}
    peer = read(peer_path)
    rows, figures = [], []
    for entry in peer["ops"]:
        if entry["op"] not in own:
            continue
        mine, theirs = own[entry["op"]], entry["seconds"]
        # Slowest of ours beside the fastest of theirs, the medians, and the reverse.
        pairs = (("min", "max"), ("median", "median"), ("max", "min"))
        ratio = [theirs[their_end] / mine[our_end] for their_end, our_end in pairs]
        rows.append({"op": entry["op"], "ours": mine, "sdpa": theirs, "of_sdpa": ratio})
        figures.append(figure(f"{entry['op']}, of SDPA ({peer['backend']})", ratio[1], OF_SDPA_AT_LEAST))
    if not figures:
        sys.exit(f"no shape was measured on both sides with {peer['backend']}")
    return said(figures), {"ops": rows, "figures": figures, "sdpa": peer}


def measured(path):
    document = read(path)
    layout = document["layouts"][0]
    if layout["measured"] is None:
        sys.exit(f"{path}: {layout['failure']['reason']}")
    return document, layout["measured"]


def mfu(path):
    document, result = measured(path)
    share = result["mfu"]["of_measured_matmul"]
    figures = [figure("MFU of the measured rate of products", share, MFU_AT_LEAST)]
    return said(figures), {"figures": figures, "bench": document}


def stages(one_path, *paths):
    document, one = measured(one_path)
    figures, documents = [], [document]
    for path in paths:
        document, several = measured(path)
        documents.append(document)
        ratio = several["tokens_per_second"] / one["tokens_per_second"]
        figures.append(figure(f"{len(several['stages'])} stages, of one", ratio, OF_ONE_STAGE_AT_LEAST))
    return said(figures), {"figures": figures, "bench": documents}


def memory(limit, before, used, path):
    """Limit in GB of 10^9 bytes; the readings are whole MiB."""
    document, result = measured(path)
    rise = (int(used) - int(before)) * 2**20
    figures = [figure("GB that used memory rose by", rise / 1e9, float(limit), at_least=False)]
    planned = sum(device["planned_bytes"] for device in result["memory"])
    note = f"{said(figures)}; planned {planned / 1e9:.2f} GB beside context and libraries"
    return note, {"figures": figures, "rise_bytes": rise, "bench": document}


def main():
    commands = {"ops": ops, "attention": attention, "mfu": mfu, "stages": stages, "memory": memory}
    note, result = commands[sys.argv[1]](*sys.argv[2:])
    print(note)
    print(json.dumps(result, separators=(",", ":")))


if __name__ == "__main__":
    main()
