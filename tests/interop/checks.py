"""All checks with the PEFT that is found first; each result is a line of JSON on standard output."""

import tempfile
from pathlib import Path

import peft
import torch
import transformers

import common
import glm4
import named
import torch_files


def main() -> None:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    common.VERSIONS.append(
        f"PEFT {peft.__version__}, transformers {transformers.__version__}, PyTorch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        torch_files.check(work / "torch")
        for generation in ["ChatGLM-6B", "ChatGLM2-6B"]:
            named.check(work / generation, generation)
        glm4.check(work / "glm4")


if __name__ == "__main__":
    main()
