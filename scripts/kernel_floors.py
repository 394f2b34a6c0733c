"""Floors of the kernels from their machine code: scripts/kernel_floors.sh calls this.

Reads the disassembly of every kernel for sm_86 and sm_90, the launches of ChatGLM-6B's ops
(tests/cuda_emulator/launches.json), those of single blocks (block_launches.json) and the counted traffic
(traffic.json); writes one JSON and the page that is made of it. Standard library only.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

# Limits of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability". Rates: NVIDIA's GA102 whitepaper (RTX 3090: tensor cores, FP16 with FP32 accumulation, dense;
# GDDR6X) and H100 data sheet (SXM5: FP16 tensor cores, dense; HBM3). Clocks: those that the rates of the
# tensor cores are stated at. Each of a multiprocessor's four parts issues one instruction of a warp per cycle.
DEVICES = {
    "sm_86": {
        "name": "RTX 3090",
        "multiprocessors": 82,
        "registers": 65536,
        "warps": 48,
        "blocks": 16,
        "shared_bytes": 102400,
        "tflops": 71.0,
        "ghz": 1.695,
        "gbytes_per_second": 936.0,
    },
    "sm_90": {
        "name": "H100 SXM",
        "multiprocessors": 132,
        "registers": 65536,
        "warps": 64,
        "blocks": 32,
        "shared_bytes": 233472,
        "tflops": 989.0,
        "ghz": 1.83,
        "gbytes_per_second": 3350.0,
    },
}
# Registers are given to a warp in pieces of 256; the system takes 1 KiB of shared memory per block.
REGISTERS_AT_ONCE = 256
SHARED_OF_SYSTEM = 1024

# What an instruction is counted as, by the beginning of its name; the first that fits.
CLASSES = [
    ("tensor", r"HMMA|IMMA|HGMMA"),
    ("copy_async", r"LDGSTS"),
    ("load_global", r"LDG|LD\b"),
    ("store_global", r"STG|ST\b"),
    ("load_matrix", r"LDSM"),
    ("load_shared", r"LDS"),
    ("store_shared", r"STS"),
    ("local", r"LDL|STL"),
    ("constant", r"LDC|ULDC"),
    ("special", r"MUFU"),
    ("multiply_add", r"FFMA"),
    ("add", r"FADD"),
    ("multiply", r"FMUL"),
    ("convert", r"F2F|F2I|I2F|HADD2\.F32|F2FP"),
    ("half", r"HFMA2|HADD2|HMUL2|HSET|HMNMX"),
    ("float_compare", r"FSETP|FMNMX|FSEL|FCHK|FSET"),
    ("shuffle", r"SHFL|VOTE|MATCH|REDUX"),
    ("barrier", r"BAR|WARPSYNC|MEMBAR|DEPBAR|LDGDEPBAR|ARRIVES"),
    ("branch", r"BRA|BRX|BSSY|BSYNC|BREAK|BMOV|EXIT|CALL|RET|JMP|KILL|YIELD|ENDCOLLECTIVE"),
    ("integer", r"IMAD(?!\.MOV)|V?IADD|VIMNMX|LOP|SHF|LEA|ISETP|IMNMX|PRMT|SEL|IABS|POPC|FLO|BMSK|SGXT|PLOP|U[A-Z]"),
    ("move", r"MOV|IMAD\.MOV|S2R|S2UR|CS2R|R2UR|P2R|R2P|NOP"),
]
CLASSES = [(name, re.compile(pattern)) for name, pattern in CLASSES]
MEMORY = {"load_global", "store_global", "copy_async", "load_shared", "store_shared"}

# Ops of one step of ChatGLM-6B: LoRA of rank 8 at query_key_value without dropout, 1 x 1024 tokens of which
# half have a target, nothing recomputed, as src/model/{block,attention,head}.rs and src/pipeline run them,
# GELU in the epilogues of the products beside it.
# Per block, but for what the first block leaves out because nothing below it is trained.
BLOCK = {
    "residual_layer_norm": 2,
    "lora_down forward": 1,
    "lora_up forward": 1,
    "query_key_value forward": 1,
    "rotary": 2,
    "attention forward 1x1024": 1,
    "attention_dense forward": 1,
    "dense_h_to_4h_gelu forward": 1,
    "dense_4h_to_h forward": 1,
    "gelu_dense_4h_to_h backward": 1,
    "dense_h_to_4h backward": 1,
    "layer_norm_backward": 2,
    "attention_dense backward": 1,
    "attention backward 1x1024": 1,
    "lora_up low_rank_backward": 1,
    "lora_down weight_gradient": 1,
    "lora_down backward": 1,
    "query_key_value backward": 1,
}
# The last block has no next one whose first norm it could take with its own sum.
NOT_IN_ALL = {
    "query_key_value backward": 1,
    "lora_down backward": 1,
    "layer_norm_backward": 1,
    "residual_layer_norm": 1,
}
# The last norm and its gradient take the rows with a target alone: half of them.
ENDS = {
    "embed": 1,
    "layer_norm": 1.5,
    "residual": 1,
    "gather_rows": 1,
    "lm_head forward": 1,
    "cross_entropy": 1,
    "lm_head backward": 1,
    "layer_norm_backward": 0.5,
    "scatter_rows": 1,
    "sum_squares": 1,
    "adamw": 1,
}
KINDS = [
    ("products", r".* (forward|backward)$", "products"),
    ("attention", r"attention (forward|backward) ", None),
    ("LoRA", r"lora_", None),
    ("norms and elementwise", r"layer_norm|rms_norm|gelu|residual|rotary|embed|gather|scatter", None),
    ("loss", r"cross_entropy", None),
    ("optimiser", r"sum_squares|adamw", None),
]


def classify(name):
    for kind, pattern in CLASSES:
        if pattern.match(name):
            return kind
    sys.exit(f"the instruction {name} is of no class")


def width(name):
    """Bytes of a memory instruction, for one lane."""
    for mark, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".16", 2), (".U8", 1), (".S8", 1), (".8", 1)):
        if mark in name:
            return size
    return 4


def counted(instructions):
    """Counts by class, accesses by class and bytes of a lane: `load_global_16`."""
    counts = Counter()
    for name in instructions:
        kind = classify(name)
        counts[f"{kind}_{width(name)}" if kind in MEMORY else kind] += 1
    return dict(sorted(counts.items()))


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+)(.*);")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")


def kernels_of(disassembly):
    """Name -> list of (address, instruction, target label), and the labels' addresses."""
    kernels, labels, waiting, current = {}, {}, [], None
    for line in disassembly.splitlines():
        section = re.match(r"^\s*\.section\s+\.text\.(\w+)", line)
        if section:
            current = kernels.setdefault(section.group(1), [])
            continue
        label = LABEL.match(line)
        if label:
            waiting.append(label.group(1))
            continue
        found = INSTRUCTION.match(line)
        if found and current is not None:
            address = int(found.group(1), 16)
            for name in waiting:
                labels[name] = address
            waiting = []
            target = TARGET.search(found.group(3))
            current.append((address, found.group(2), target.group(1) if target else None))
    return kernels, labels


def innermost_loops(instructions, labels):
    """Ranges of backward branches that hold no other; a branch to itself is what ends a kernel's code."""
    ranges = set()
    for address, name, target in instructions:
        if name.startswith("BRA") and target in labels and labels[target] < address:
            ranges.add((labels[target], address))
    inside = lambda a, b: b[0] <= a[0] and a[1] <= b[1] and a != b
    return sorted(r for r in ranges if not any(inside(other, r) for other in ranges))


def machine_code(folder, nvdisasm):
    """Every kernel on every architecture."""
    all_kernels = {}
    for arch in DEVICES:
        kernels = {}
        for cubin in sorted((folder / arch).glob("*.cubin")):
            text = subprocess.run([nvdisasm, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
            code, labels = kernels_of(text)
            for name, usage in usages(cubin.with_suffix(".log").read_text()).items():
                instructions = code[name]
                loops = [
                    counted(i for a, i, _ in instructions if first <= a <= last)
                    for first, last in innermost_loops(instructions, labels)
                ]
                kernels[name] = {
                    "file": cubin.stem + ".cu",
                    **usage,
                    "instructions": counted(i for _, i, _ in instructions),
                    "innermost_loops": loops,
                }
        if not kernels:
            sys.exit(f"no machine code in {folder / arch}")
        all_kernels[arch] = dict(sorted(kernels.items()))
    return all_kernels


def usages(log):
    """ptxas's report: registers, static shared memory, bytes spilled."""
    found, name = {}, None
    for line in log.splitlines():
        entry = re.search(r"Compiling entry function '(\w+)'", line)
        if entry:
            name = entry.group(1)
            found[name] = {"registers": 0, "static_shared_bytes": 0, "local_bytes": 0}
        if name and (spill := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line)):
            found[name]["local_bytes"] = sum(map(int, spill.groups()))
        if name and (used := re.search(r"Used (\d+) registers", line)):
            found[name]["registers"] = int(used.group(1))
            if shared := re.search(r"(\d+) bytes smem", line):
                found[name]["static_shared_bytes"] = int(shared.group(1))
    return found


def occupancy(device, registers, threads, shared):
    """Blocks of a multiprocessor at a time, its warps with them, and what allows no more."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    limits = {
        "blocks": device["blocks"],
        "warps": device["warps"] // warps,
        "registers": device["registers"] // (per_warp * warps),
        "shared": device["shared_bytes"] // (shared + SHARED_OF_SYSTEM),
    }
    blocks = min(limits.values())
    return blocks, blocks * warps, [name for name, limit in limits.items() if limit == blocks][0]


def launched(device, code, geometry):
    kernel = code[geometry["kernel"]]
    threads = geometry["block"][0] * geometry["block"][1] * geometry["block"][2]
    shared = kernel["static_shared_bytes"] + geometry["shared"]
    blocks, warps, limit = occupancy(device, kernel["registers"], threads, shared)
    total = geometry["grid"][0] * geometry["grid"][1] * geometry["grid"][2]
    return {
        "kernel": geometry["kernel"],
        "registers": kernel["registers"],
        "shared_bytes": shared,
        "threads": threads,
        "blocks": total,
        "blocks_per_multiprocessor": blocks,
        "warps_per_multiprocessor": warps,
        "occupancy": round(warps / device["warps"], 3),
        "limited_by": limit,
        # Below 1 some multiprocessors have nothing to do.
        "blocks_for_each_multiprocessor": round(total / device["multiprocessors"], 2),
    }


def floor_us(device, work):
    """The longer of moving the bytes and doing the operations, at the vendor's rates."""
    by_bytes = (work["read"] + work["written"]) / device["gbytes_per_second"] / 1e3
    by_flops = work["flops"] / device["tflops"] / 1e6
    return max(by_bytes, by_flops), "bytes" if by_bytes >= by_flops else "operations"


def issue_us(device, code, op):
    """Time to issue the instructions of an op whose one kernel is one loop over its elements, or None."""
    if op["bound"] != "memory" or op["flops"] or len(op["kernels"]) != 1 or not code["innermost_loops"]:
        return None
    loop = max(code["innermost_loops"], key=bytes_of_lane)
    moved = op["work"]["read"] + op["work"]["written"]
    elements = bytes_of_lane(loop) / (moved / op["work"]["elements"])
    # Rows that are kept in registers are loaded outside of the loop that stores them.
    stored = bytes_of_lane(loop, ("store_global",)) / bytes_of_lane(loop)
    if abs(stored - op["work"]["written"] / moved) > 0.02:
        return None
    warp_instructions = op["work"]["elements"] / elements * sum(loop.values()) / 32
    return warp_instructions / (4 * device["multiprocessors"] * device["ghz"] * 1e3)


def bytes_of_lane(loop, kinds=("load_global", "store_global", "copy_async")):
    """Bytes of global memory that one turn of a loop moves for a lane."""
    sizes = (name.rsplit("_", 1) for name in loop if name.startswith(kinds))
    return sum(int(size) * loop[f"{kind}_{size}"] for kind, size in sizes)


def kind_of(op):
    for kind, pattern, bound in KINDS:
        if re.match(pattern, op["op"]) and bound in (None, op["bound"]):
            return kind
    sys.exit(f"no kind of work for {op['op']}")


def step(ops, blocks):
    """Floors of a training step by kind of work, and the share that its operations take."""
    by_name = {op["op"]: op for op in ops}
    counts = Counter()
    for name, count in BLOCK.items():
        counts[name] += count * blocks
    counts.subtract(NOT_IN_ALL)
    counts.update(ENDS)
    result = {}
    for arch, device in DEVICES.items():
        kinds, flops = Counter(), 0
        for name, count in counts.items():
            op = by_name[name]
            kinds[kind_of(op)] += count * op["floor"][arch]["us"]
            if op["bound"] != "memory":
                flops += count * op["flops"]
        total = sum(kinds.values())
        result[arch] = {
            "ms": round(total / 1e3, 3),
            "kinds": {kind: {"ms": round(us / 1e3, 3), "share": round(us / total, 4)} for kind, us in kinds.items()},
            "tflop": round(flops / 1e12, 3),
            "mfu": round(flops / device["tflops"] / 1e6 / total, 4),
        }
    return {"ops": dict(counts), "devices": result}


def measure(folder, nvdisasm, launches, traffic, blocks):
    code = machine_code(folder, nvdisasm)
    asked = {op["op"].split(" 1x")[0]: op for op in traffic["ops"]}
    ops = []
    for op in launches["ops"]:
        work = op["work"]
        moved = work["read"] + work["written"]
        entry = {
            "op": op["op"],
            "bound": op["bound"],
            "bytes": moved,
            "flops": work["flops"],
            "elements": work["elements"],
            "bytes_per_element": round(moved / work["elements"], 3),
            "flop_per_byte": round(work["flops"] / moved, 2),
            "floor": {},
            "kernels": {},
        }
        counted_op = asked.get(op["op"].split(" 1x")[0])
        if counted_op:
            entry["requested_of_minimum"] = counted_op["requested"]
            entry["touched_of_minimum"] = counted_op["touched"]
        for arch, device in DEVICES.items():
            us, bound = floor_us(device, work)
            entry["floor"][arch] = {"us": round(us, 2), "bound": bound}
            once = entry.get("requested_of_minimum", 2) < 1.2
            issued = once and issue_us(device, code[arch][op["kernels"][0]["kernel"]], {**op, "flops": work["flops"]})
            if issued:
                entry["floor"][arch]["issue_us"] = round(issued, 2)
            entry["kernels"][arch] = [launched(device, code[arch], geometry) for geometry in op["kernels"]]
        ops.append(entry)
    return {
        "devices": DEVICES,
        "sizes": launches["sizes"],
        "ops": ops,
        "step": step(ops, launches["sizes"]["blocks"]),
        "blocks": blocks["blocks"],
        "kernels": code,
    }


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def number(x):
    return f"{x:,.2f}" if x < 100 else f"{x:,.0f}"


def page(result):
    names = {arch: f"{device['name']} ({arch})" for arch, device in result["devices"].items()}
    parts = [
        f"""# Kernel floors

Made by `scripts/kernel_floors.sh` from machine code, launches and counted traffic; nothing here was timed.
The figures stand in measurements/kernel-floors.json (commit {result["commit"][:12]}, NVRTC {result["nvrtc"]}, nvdisasm
{result["nvdisasm"]}). [PERFORMANCE.md](PERFORMANCE.md#kernel-floors) reads them.

Shapes: ChatGLM-6B, 1 x {result["sizes"]["rows"]} tokens, {result["sizes"]["target_rows"]} of them with a target, LoRA of rank {result["sizes"]["rank"]}. A floor is the longer of two
times: every operand moved once at the card's memory rate, and every operation done at its rate of half products
with float sums, by the vendor's figures: """
        + "; ".join(
            f"{names[arch]} {device['tflops']:g} TFLOP/s and {device['gbytes_per_second']:,.0f} GB/s"
            for arch, device in result["devices"].items()
        )
        + """.
Issue: the time in which the instructions of the loop can be issued, for ops whose kernel is one loop.
""",
        """## Ops

Asked and touched: bytes that the threads of our kernels ask of device memory, and pieces of 32 bytes that
they touch, over the minimum, counted on an emulated GPU at a smaller shape
(tests/cuda_emulator/traffic.json, with the reasons). What is asked for and not touched again comes from the caches.
""",
        table(
            ["op", "bytes per element", "FLOP per byte", "MB"]
            + [f"floor, µs, {names[arch]}" for arch in names]
            + [f"issue, µs, {arch}" for arch in names]
            + ["bound by", "asked", "touched"],
            [
                [op["op"], op["bytes_per_element"], op["flop_per_byte"], f"{op['bytes'] / 1e6:,.1f}"]
                + [number(op["floor"][arch]["us"]) for arch in names]
                + [op["floor"][arch].get("issue_us", "") for arch in names]
                + [
                    ", ".join(sorted({op["floor"][arch]["bound"] for arch in names})),
                    op.get("requested_of_minimum", "cuBLASLt"),
                    op.get("touched_of_minimum", ""),
                ]
                for op in result["ops"]
            ],
        ),
        """## Launches of a block

What one micro-batch has a block queue that has others before and behind it, nothing computed again: our kernels
and calls of cuBLASLt, by a model of three blocks less one of two on an emulated GPU whose cuBLASLt has
algorithms with GELU (tests/cuda_emulator/block_launches.json, which names the kernels; tests/kernel_traffic.rs
holds it).
""",
        table(
            ["model", "adapter", "forward: kernels", "products", "backward: kernels", "products"],
            [
                [block["model"], block["adapter"]]
                + [block[way][kind] for way in ("forward", "backward") for kind in ("kernels", "products")]
                for block in result["blocks"]
            ],
        ),
    ]
    parts.append(
        """## One training step

LoRA of rank 8 at query_key_value, nothing recomputed: the floors of all its ops, and the share of the rate that
products and attention would then have of the vendor's (MFU), were nothing lost beside them.
"""
    )
    kinds = list(dict.fromkeys(k for r in result["step"]["devices"].values() for k in r["kinds"]))
    parts.append(
        table(
            ["", *names.values()],
            [
                [kind]
                + [
                    f"{r['kinds'][kind]['ms']:.2f} ms, {100 * r['kinds'][kind]['share']:.1f} %"
                    for r in result["step"]["devices"].values()
                ]
                for kind in kinds
            ]
            + [["step"] + [f"{r['ms']:.2f} ms" for r in result["step"]["devices"].values()]]
            + [["MFU that the floors allow"] + [f"{100 * r['mfu']:.1f} %" for r in result["step"]["devices"].values()]],
        )
    )
    parts.append("## What stands out\n\n" + "\n".join(f"- {line}" for line in findings(result)) + "\n")
    parts.append(
        """## Kernels

As launched for the shapes above. Occupancy: warps that a multiprocessor holds at a time, of those it could, and
what allows no more. Blocks per multiprocessor: all blocks of the launch over all multiprocessors; below 1 some
have nothing to do. Loops: instructions of the innermost loops of a thread, the longest one first: all, those on
tensor cores, of global memory with the bytes of a lane (c: asynchronous copies), of shared memory.
"""
    )
    seen, rows = set(), []
    for op in result["ops"]:
        for arch in names:
            for kernel in op["kernels"][arch]:
                key = (kernel["kernel"], arch)
                if key in seen:
                    continue
                seen.add(key)
                code = result["kernels"][arch][kernel["kernel"]]
                rows.append(
                    [
                        kernel["kernel"],
                        arch,
                        kernel["registers"],
                        code["local_bytes"],
                        kernel["shared_bytes"],
                        kernel["threads"],
                        f"{100 * kernel['occupancy']:.0f} % ({kernel['limited_by']})",
                        kernel["blocks_for_each_multiprocessor"],
                        sum(code["instructions"].values()),
                        loop_text(code["innermost_loops"]),
                    ]
                )
    head = ["kernel", "for", "registers", "spilled", "shared bytes", "threads", "occupancy", "blocks per multiprocessor"]
    parts.append(table([*head, "instructions", "loops"], sorted(rows, key=lambda row: (row[0], row[1]))))
    return "\n".join(parts)


def findings(result):
    """What in the tables keeps a kernel from its floor, whatever else may."""
    launches = [
        (op, arch, kernel) for op in result["ops"] for arch, kernels in op["kernels"].items() for kernel in kernels
    ]

    def named(chosen, text):
        found = {}
        for op, arch, kernel in launches:
            if chosen(op, arch, kernel):
                found.setdefault(kernel["kernel"], {})[arch] = text(op, arch, kernel)
        return "; ".join(
            f"`{name}` ({', '.join(f'{arch} {said}' for arch, said in sorted(by_arch.items()))})"
            for name, by_arch in sorted(found.items())
        ) or "none"

    of_issue = lambda op, arch: op["floor"][arch].get("issue_us", 0) / op["floor"][arch]["us"]
    return [
        "Fewer blocks than multiprocessors, so that some are idle: "
        + named(
            lambda op, arch, k: k["blocks_for_each_multiprocessor"] < 1,
            lambda op, arch, k: f"{k['blocks_for_each_multiprocessor']:.2f} blocks for each",
        )
        + ".",
        "One block at a time on a multiprocessor, so that nothing runs while it waits at a barrier: "
        + named(lambda op, arch, k: k["blocks_per_multiprocessor"] == 1, lambda op, arch, k: f"for {k['limited_by']}")
        + ".",
        "Less than a quarter of the warps: "
        + named(
            lambda op, arch, k: k["occupancy"] < 0.25,
            lambda op, arch, k: f"{k['warps_per_multiprocessor']} warps, {k['registers']} registers",
        )
        + ".",
        "Instructions that take more than 0.7 of the time that the bytes take: "
        + named(lambda op, arch, k: of_issue(op, arch) > 0.7, lambda op, arch, k: f"{of_issue(op, arch):.2f}")
        + ".",
        "Local memory: none in any kernel, on either.",
    ]


def loop_text(loops):
    texts = []
    for loop in sorted(loops, key=lambda loop: -sum(loop.values()))[:2]:
        parts = [str(sum(loop.values()))]
        if tensor := loop.get("tensor"):
            parts.append(f"{tensor} tensor")
        for kind, sign in (("load_global", "ld"), ("copy_async", "c"), ("store_global", "st")):
            for size in (16, 8, 4, 2, 1):
                if count := loop.get(f"{kind}_{size}"):
                    parts.append(f"{count} {sign}{size}")
        shared = sum(n for k, n in loop.items() if k.startswith(("load_shared", "store_shared", "load_matrix")))
        if shared:
            parts.append(f"{shared} shared")
        texts.append(" ".join([parts[0] + ":", ", ".join(parts[1:])]).strip().rstrip(":"))
    return "; ".join(texts) or "none"


def document(result):
    """JSON with an op or a kernel on a line."""
    line = lambda value: json.dumps(value, separators=(", ", ": "))
    lines = []
    for key, value in result.items():
        if key == "ops":
            text = "[\n  " + ",\n  ".join(map(line, value)) + "\n ]"
        elif key == "kernels":
            archs = (
                f'  "{arch}": {{\n   ' + ",\n   ".join(f'"{name}": {line(k)}' for name, k in kernels.items()) + "\n  }"
                for arch, kernels in value.items()
            )
            text = "{\n" + ",\n".join(archs) + "\n }"
        else:
            text = line(value)
        lines.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main():
    folder, nvdisasm, commit, json_path, page_path = sys.argv[1:]
    folder = Path(folder)
    emulator = Path("tests/cuda_emulator")
    read = lambda name: json.loads((emulator / name).read_text())
    version = subprocess.run([nvdisasm, "--version"], check=True, capture_output=True, text=True).stdout
    result = {
        "made_by": "scripts/kernel_floors.sh",
        "commit": commit,
        "nvrtc": (folder / "nvrtc").read_text().strip(),
        "nvdisasm": re.search(r"release ([\d.]+)", version).group(1),
        **measure(folder, nvdisasm, read("launches.json"), read("traffic.json"), read("block_launches.json")),
    }
    spilled = [
        f"{arch} {name}"
        for arch, kernels in result["kernels"].items()
        for name, kernel in kernels.items()
        if kernel["local_bytes"] or kernel["instructions"].get("local")
    ]
    if spilled:
        sys.exit("kernels with local memory: " + ", ".join(spilled))
    Path(json_path).write_text(document(result))
    Path(page_path).write_text(page(result))
    for arch, summary in result["step"]["devices"].items():
        print(f"{arch}: step {summary['ms']} ms at the least, MFU {summary['mfu']} at the most")


if __name__ == "__main__":
    main()
