"""PyTorch files: torch.load of what mp-train writes."""

import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from common import EXAMPLE, equal, run, tell

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8,
         torch.int16, torch.int32, torch.int64, torch.bool]


def check(work: Path) -> None:
    work.mkdir()
    tensors = {}
    for dtype in TYPES:
        for shape in [(), (5,), (3, 7), (2, 1, 3), (0, 4)]:
            tensors[f"{dtype}.{list(shape)}"] = (torch.randn(shape) * 50).to(dtype)
    save_file(tensors, work / "all.safetensors")
    path = work / "all.bin"
    run(EXAMPLE, "torch", work / "all.safetensors", path)
    for how, flags in [("", {}), (", mapped", {"mmap": True})]:
        found = torch.load(path, weights_only=True, map_location="cpu", **flags)
        what = f"torch.load(weights_only=True{how}) of a file of all types written here"
        equal(what, [(found[name], tensor) for name, tensor in tensors.items()])
    entries = zipfile.ZipFile(path).infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    intact = zipfile.ZipFile(path).testzip() is None
    tell("its zip entries are stored and their checksums right", f"{len(entries)} entries", "all",
         stored and intact)
