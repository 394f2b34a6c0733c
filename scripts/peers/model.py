"""ChatGLM-6B in PyTorch as its predecessors run it: peer (a), and the weights that peer (b) uses too.

`ChatGlm` holds the weights under the names of the published checkpoint. Its forward takes batches padded to
their longest row, with a mask in memory, eager attention, and logits at every position. packed.py has the
other forward.

What is computed: docs/NUMERICS.md and tests/golden/chatglm-6b/README.md.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from workload import IGNORED

#: The residual's factor, sqrt(2 * 28) whatever the number of blocks.
ALPHA = 56**0.5
HIDDEN_SCORE = -10_000.0


@dataclass(frozen=True)
class Config:
    """What config.json says."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_layers: int
    layernorm_epsilon: float
    bos_token_id: int
    gmask_token_id: int
    max_sequence_length: int
    pad_token_id: int

    @staticmethod
    def of(settings: dict) -> "Config":
        return Config(**{name: settings[name] for name in Config.__dataclass_fields__})

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def rotary_tables(config: Config, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of half a head, `[positions, head_dim / 2]`; inverse frequencies rounded to half."""
    width = config.head_dim // 2
    inverse = 10_000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    inverse = inverse.half().float()
    angles = torch.arange(config.max_sequence_length, device=device, dtype=torch.float32)[:, None] * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def places(config: Config, ids: list[int]) -> tuple[int, list[int], list[int]]:
    """Length of the context, and both positions of every token of a row with [gMASK] and sop."""
    sop, mask = ids.index(config.bos_token_id), ids.index(config.gmask_token_id)
    outside = [index if index < sop else mask for index in range(len(ids))]
    inside = [max(0, index - sop + 1) for index in range(len(ids))]
    return sop, outside, inside


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Both halves of every head turned, each by its own position; `cos` and `sin` are `[.., 1, head_dim]`."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([rotate_half(first), rotate_half(second)], dim=-1)
    return x * cos + turned * sin


@dataclass
class Padded:
    """A batch of rows as long as its longest: `[rows, longest]`."""

    ids: torch.Tensor
    labels: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    #: `[rows, 1, longest, longest]`, true where a key is hidden.
    mask: torch.Tensor


def visible(length: int, context: int, device) -> torch.Tensor:
    """`[length, length]`: key k is seen by query t when k <= t or k < context."""
    at = torch.arange(length, device=device)
    return (at[None, :] <= at[:, None]) | (at[None, :] < context)


class Attention(nn.Module):
    """Weights of one block's attention."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        wide = config.hidden_size
        self.query_key_value = nn.Linear(wide, 3 * wide)
        self.dense = nn.Linear(wide, wide)
        self.config, self.index = config, index

    def forward(self, x, cos, sin, mask, past):
        """Eager, `[rows, longest, hidden]`; `past` is keys and values `[rows, prefix, heads, head_dim]`."""
        config = self.config
        heads = (config.num_attention_heads, 3 * config.head_dim)
        query, key, value = self.query_key_value(x).unflatten(-1, heads).chunk(3, dim=-1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=1), torch.cat([past[1], value], dim=1)
        coefficient = float(self.index + 1)
        query = query / (config.head_dim**0.5 * coefficient)
        scores = torch.matmul(query.transpose(1, 2), key.permute(0, 2, 3, 1))
        scores = scores.masked_fill(mask, HIDDEN_SCORE).float() * coefficient
        weights = torch.softmax(scores, dim=-1).to(x.dtype)
        context = torch.matmul(weights, value.transpose(1, 2))
        return self.dense(context.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Weights of one block's MLP."""

    def __init__(self, config: Config):
        super().__init__()
        wide = config.hidden_size
        self.dense_h_to_4h = nn.Linear(wide, 4 * wide)
        self.dense_4h_to_h = nn.Linear(4 * wide, wide)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Block(nn.Module):
    """One block; its residual starts from the norms' outputs."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        norm = lambda: nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.attention, self.mlp = Attention(config, index), Mlp(config)

    def forward(self, x, cos, sin, mask, past):
        normed = self.input_layernorm(x)
        x = normed * ALPHA + self.attention(normed, cos, sin, mask, past)
        normed = self.post_attention_layernorm(x)
        return normed * ALPHA + self.mlp(normed)


class Transformer(nn.Module):
    """Everything but the head."""

    def __init__(self, config: Config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)


class ChatGlm(nn.Module):
    """The frozen base. The head is the embedding."""

    def __init__(self, config: Config, dtype: torch.dtype, device):
        super().__init__()
        with torch.device("meta"):
            self.transformer = Transformer(config)
        self.to(dtype)
        self.to_empty(device=device)
        self.requires_grad_(False)
        self.settings = config
        self.tables = rotary_tables(config, device)

    def load(self, folder: Path) -> None:
        """Reads a model folder.

        A tensor that is missing, left over or of another shape is an error.
        """
        own = dict(self.named_parameters())
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    own.pop(name).data.copy_(tensors.get_tensor(name))
        if own:
            raise ValueError(f"{folder} lacks {sorted(own)[:3]}")

    def pad(self, rows: list[dict], prefix: int) -> Padded:
        """Collates rows; every row in full, ids of padding behind it."""
        config, device = self.settings, self.tables[0].device
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), config.pad_token_id)
        labels = torch.full((len(rows), longest), IGNORED)
        positions = torch.zeros((2, len(rows), longest), dtype=torch.long)
        mask = torch.zeros((len(rows), 1, longest, prefix + longest), dtype=torch.bool)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row["labels"])
            padded = row["input_ids"] + [config.pad_token_id] * (longest - length)
            context, *both = places(config, padded)
            positions[:, index] = torch.tensor(both)
            mask[index, 0, :, prefix:] = ~visible(longest, context, "cpu")
        cos, sin = (self.turns(table, positions.to(device)) for table in self.tables)
        return Padded(ids.to(device), labels.to(device), cos, sin, mask.to(device))

    def turns(self, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Both halves of a head side by side, `[.., 1, head_dim]`, for `positions [2, ..]`."""
        both = torch.cat([table[positions[0]], table[positions[1]]], dim=-1)
        return both.unsqueeze(-2).to(self.transformer.word_embeddings.weight.dtype)

    def forward(self, batch: Padded, past: list | None = None, recompute: bool = False) -> torch.Tensor:
        """Mean loss over the targets, from logits at every position."""
        x = self.transformer.word_embeddings(batch.ids)
        for index, block in enumerate(self.transformer.layers):
            given = (x, batch.cos, batch.sin, batch.mask, past[index] if past else None)
            x = checkpoint(block, *given, use_reentrant=False) if recompute else block(*given)
        x = self.transformer.final_layernorm(x)
        logits = F.linear(x, self.transformer.word_embeddings.weight).float()
        shifted = logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(shifted, batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
