"""One peer as a process: reads a line of JSON per request, answers with a line of JSON.

The first line says what to run (see `Peer`); `{"do": "options"}` chooses how peer (b) runs, `{"do": "steps"}`
trains from the start values over some batches and answers with losses, gradient norms and seconds per step. A
step's time is all of a step: collating, forward, backward, clipping, update, and the loss on the host.
"""

import json
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import workload
from model import ChatGlm, Config
from packed import Options, PackedForward, onednn_linear
from workload import IGNORED, LORA_ALPHA, LORA_R, SIZES

#: Against the underflow of half-precision gradients; `mp-train bench` takes the same.
LOSS_SCALE = 1024.0


def random_values(module: nn.Module, seed: int) -> None:
    """Values made where they are used, as `mp-train bench` makes them."""
    generator = None
    for name, parameter in module.named_parameters():
        generator = generator or torch.Generator(parameter.device).manual_seed(seed)
        workload.fill(name, parameter.data, generator)


def with_peft(base: nn.Module, size: workload.Size) -> nn.Module:
    """The base with LoRA by PEFT."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base, LoraConfig(
        r=LORA_R, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=workload.lora_targets(size)))


def set_peft_values(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Start values under the names of an adapter file; every one must find its place, and every place one."""
    own = {name.replace(".default.", "."): parameter for name, parameter in model.named_parameters()
           if "lora_" in name}
    if own.keys() != tensors.keys():
        raise ValueError(f"adapter file and PEFT differ: {sorted(own.keys() ^ tensors.keys())[:3]}")
    for name, parameter in own.items():
        parameter.data.copy_(tensors[name])


class Eager:
    """Peer (a): padded batches, eager attention, PEFT, plain AdamW."""

    def __init__(self, model: ChatGlm, size: workload.Size, adapter: str, recompute: bool):
        self.base, self.adapter, self.recompute = model, adapter, recompute
        self.prefix = None
        if adapter == "lora":
            self.model = with_peft(model, size)
        else:
            self.model = model
            width = size.num_layers * 2 * size.hidden_size
            self.prefix = nn.Embedding(size.pre_seq_len, width, device=model.tables[0].device)

    def parameters(self) -> list[nn.Parameter]:
        found = self.model.parameters() if self.prefix is None else self.prefix.parameters()
        return [parameter for parameter in found if parameter.requires_grad]

    def set_values(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.prefix is None:
            set_peft_values(self.model, tensors)
        else:
            (values,) = tensors.values()
            self.prefix.weight.data.copy_(values)

    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=0.0)

    def loss(self, rows: list[dict]) -> torch.Tensor:
        if self.prefix is None:
            return self.model(self.base.pad(rows, 0), recompute=self.recompute)
        batch = self.base.pad(rows, self.prefix.num_embeddings)
        return self.model(batch, past=self.past(len(rows), batch.cos.dtype), recompute=self.recompute)

    def past(self, rows: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of every block, looked up for every row as THUDM's prefix encoder does."""
        config, device = self.base.settings, self.prefix.weight.device
        tokens = torch.arange(self.prefix.num_embeddings, device=device).expand(rows, -1)
        shape = (config.num_layers, 2, config.num_attention_heads, config.head_dim)
        values = self.prefix(tokens).to(dtype).unflatten(-1, shape)
        return [values[:, :, index].unbind(2) for index in range(config.num_layers)]


class Best:
    """Peer (b): packed batches, own LoRA, fused AdamW, whatever `Options` is fastest."""

    def __init__(self, model: ChatGlm, size: workload.Size, adapter: str, options: Options):
        self.base, device = model, model.tables[0].device
        self.lora, self.prefix = None, None
        if adapter == "lora":
            wide = size.hidden_size
            new = lambda *shape: nn.Parameter(torch.zeros(*shape, device=device))
            self.lora = [(new(LORA_R, wide), new(3 * wide, LORA_R), LORA_ALPHA / LORA_R)
                         for _ in range(size.num_layers)]
        else:
            shape = (size.pre_seq_len, size.num_layers * 2 * size.hidden_size)
            self.prefix = nn.Parameter(torch.zeros(shape, device=device))
        self.choose(options)

    def choose(self, options: Options) -> None:
        torch.compiler.reset()
        self.forward = PackedForward(self.base, options, self.lora, self.prefix)

    def parameters(self) -> list[nn.Parameter]:
        if self.lora is None:
            return [self.prefix]
        return [parameter for a, b, _ in self.lora for parameter in (a, b)]

    def set_values(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.lora is None:
            (values,) = tensors.values()
            self.prefix.data.copy_(values)
            return
        lead = "base_model.model.transformer.layers.{}.attention.query_key_value.lora_{}.weight"
        for index, (a, b, _) in enumerate(self.lora):
            a.data.copy_(tensors.pop(lead.format(index, "A")))
            b.data.copy_(tensors.pop(lead.format(index, "B")))
        if tensors:
            raise ValueError(f"the adapter file has more than was asked for: {sorted(tensors)[:3]}")

    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)

    def loss(self, rows: list[dict]) -> torch.Tensor:
        return self.forward(rows)


class Transformers:
    """transformers + PEFT as installed, for GLM-4: its padded batches, its attention, its loss."""

    def __init__(self, folder: Path | None, size: workload.Size, dtype, device, recompute: bool):
        from transformers import AutoModelForCausalLM, GlmConfig

        if folder is None:
            settings = {name: value for name, value in workload.config_json(size).items()
                        if name not in ("architectures", "model_type", "torch_dtype")}
            with torch.device(device):
                base = AutoModelForCausalLM.from_config(GlmConfig(**settings), dtype=dtype)
            random_values(base, 1)
        else:
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        if recompute:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        base.config.use_cache = False
        self.model, self.device = with_peft(base, size).train(), device
        self.attention = base.config._attn_implementation

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def set_values(self, tensors: dict[str, torch.Tensor]) -> None:
        set_peft_values(self.model, tensors)

    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=0.0)

    def loss(self, rows: list[dict]) -> torch.Tensor:
        longest = max(len(row["input_ids"]) for row in rows)
        pad = lambda values, fill: values + [fill] * (longest - len(values))
        columns = {
            "input_ids": [pad(row["input_ids"], 0) for row in rows],
            "labels": [pad(row["labels"], IGNORED) for row in rows],
            "attention_mask": [pad([1] * len(row["input_ids"]), 0) for row in rows],
        }
        return self.model(**{name: torch.tensor(rows).to(self.device) for name, rows in columns.items()}).loss


class Peer:
    """A peer, its batches and its start values."""

    def __init__(self, asked: dict):
        self.asked, self.device = asked, asked["device"]
        if self.device == "cpu":
            torch.set_num_threads(asked["threads"])
        size = SIZES[asked["size"]]
        dtype = getattr(torch, asked["dtype"])
        folder = Path(asked["model"]) if asked["model"] else None
        recompute = asked["recompute"]
        if asked["peer"] == "transformers":
            self.runs = Transformers(folder, size, dtype, self.device, recompute)
        else:
            model = ChatGlm(Config.of(workload.config_json(size)), dtype, self.device)
            model.load(folder) if folder else random_values(model, 1)
            if asked["peer"] == "a":
                self.runs = Eager(model, size, asked["adapter"], recompute)
            else:
                options = Options(**{**asked["options"], "recompute": recompute})
                self.runs = Best(model, size, asked["adapter"], options)
        self.scale = LOSS_SCALE if dtype == torch.float16 else 1.0
        self.batches = workload.read_batches(Path(asked["rows"]), size.rows)
        file = {"lora": "adapter_model.safetensors", "prefix": "prefix.safetensors"}[asked["adapter"]]
        self.start_values = load_file(Path(asked["adapter_folder"]) / file)

    def hello(self) -> dict:
        """Versions, the device, and how fast a plain product is in this process."""
        import importlib.metadata as metadata

        names = ["torch", "transformers", "peft", "safetensors"]
        found = {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
        about = {"versions": found, "threads": torch.get_num_threads(), "product_gflops": self.product_rates()}
        if self.device != "cpu":
            about |= {"cuda": torch.version.cuda, "device_name": torch.cuda.get_device_name(self.device)}
        return about

    def product_rates(self) -> dict[str, float]:
        """Best of several products `[1024, 1024] x [1024, 4096]`, 10^9 operations per second."""
        half = self.scale != 1.0
        kind = {"device": self.device, "dtype": torch.float16 if half else torch.float32}
        # On a GPU a product that is large enough to fill it.
        side = 1_024 if self.device == "cpu" else 4_096
        x, weight = torch.randn(side, side, **kind), torch.randn(4 * side, side, **kind)
        ways = {"default": lambda: F.linear(x, weight)}
        if self.device == "cpu":
            ways["onednn"] = lambda: onednn_linear(x, weight)
        rates = {}
        for name, way in ways.items():
            seconds = [self.timed(way) for _ in range(6)]
            rates[name] = 2.0 * side * side * 4 * side / min(seconds[1:]) / 1e9
        return rates

    def timed(self, way) -> float:
        self.wait()
        began = time.perf_counter()
        way()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def steps(self, first: int, count: int) -> dict:
        """Trains from the start values over `count` batches from `first` on."""
        self.runs.set_values(dict(self.start_values))
        self.optimizer = self.runs.optimizer(self.asked["learning_rate"])
        found = {"losses": [], "grad_norms": [], "seconds": [], "tokens": []}
        share = self.asked["accumulation"]
        for step in range(first, first + count):
            batches = self.batches[step * share : (step + 1) * share]
            self.wait()
            began = time.perf_counter()
            loss, norm = self.step(batches)
            found["losses"].append(loss.item())
            found["grad_norms"].append(norm.item())
            self.wait()
            found["seconds"].append(time.perf_counter() - began)
            found["tokens"].append(sum(len(row["input_ids"]) for rows in batches for row in rows))
        if self.device != "cpu":
            free, total = torch.cuda.mem_get_info()
            found["used_bytes"] = total - free
            found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        return found

    def step(self, batches: list[list[dict]]) -> tuple[torch.Tensor, torch.Tensor]:
        """One update from several batches, in whose loss every target weighs the same."""
        parameters = self.runs.parameters()
        self.optimizer.zero_grad(set_to_none=True)
        targets = [sum(label != IGNORED for row in rows for label in row["labels"]) for rows in batches]
        total = 0.0
        for rows, count in zip(batches, targets):
            loss = self.runs.loss(rows) * (count / sum(targets))
            (loss * self.scale).backward()
            total = total + loss.detach()
        if self.scale != 1.0:
            torch._foreach_mul_([parameter.grad for parameter in parameters], 1.0 / self.scale)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        return total, norm

    def attention_kernels(self) -> list[str]:
        """Names of the attention operators that a step runs."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as seen:
            self.steps(0, 1)
        names = {event.key for event in seen.key_averages()}
        return sorted(name for name in names if "attention" in name.lower() and "::_" in name)


def main() -> None:
    # Whatever else is printed must not stand between the answers.
    out, sys.stdout = sys.stdout, sys.stderr
    answer = lambda found: print(json.dumps(found), file=out, flush=True)
    peer = Peer(json.loads(sys.stdin.readline()))
    answer(peer.hello())
    for line in sys.stdin:
        asked = json.loads(line)
        match asked["do"]:
            case "options":
                peer.runs.choose(Options(**{**asked["options"], "recompute": peer.asked["recompute"]}))
                answer({})
            case "steps":
                answer(peer.steps(asked["first"], asked["count"]))
            case "attention":
                answer({"kernels": peer.attention_kernels()})


if __name__ == "__main__":
    main()
