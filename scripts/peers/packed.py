"""ChatGLM-6B in PyTorch as fast as it goes: peer (b).

No padding: the rows of a batch stand one behind the other. Attention is scaled_dot_product_attention with a mask
made once for all blocks (`mask`), the same in two calls without a mask (`split`), or FlexAttention (`flex`). The
head sees rows with a target alone. Which of these, which matrix product and what is compiled is `Options`; the
driver tries them and takes the fastest.
"""

from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import library, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from model import ALPHA, ChatGlm, places, rotate, visible
from workload import IGNORED


@dataclass(frozen=True)
class Options:
    """One way to run peer (b)."""

    #: `mask`, `split` or `flex`.
    attention: str = "mask"
    #: `default`: F.linear; `onednn`: oneDNN's products, for frozen weights in f32 on a CPU.
    linear: str = "default"
    #: `none`; `blocks`: everything of a block but its attention; `whole`: from embedding to last block.
    compile: str = "none"
    recompute: bool = False

    @property
    def name(self) -> str:
        parts = [self.attention, self.linear, f"compile {self.compile}"]
        return ", ".join(parts + ["recomputation"] * self.recompute)

    def json(self) -> dict:
        return asdict(self)


# An operator of its own: the compiler knows oneDNN's with packed weights alone, which have no backward.
@library.custom_op("peers::frozen_linear", mutates_args=())
def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` by oneDNN, which uses all of a CPU's instructions whoever made it; for weights not trained."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@frozen_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def keep_weight(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def input_gradient(ctx, gradient):
    (weight,) = ctx.saved_tensors
    return frozen_linear(gradient.contiguous(), weight.t(), None), None, None


frozen_linear.register_autograd(input_gradient, setup_context=keep_weight)


def onednn_linear(x, weight, bias=None):
    """`F.linear` for weights that are not trained."""
    return frozen_linear(x.contiguous(), weight, bias)


LINEAR = {"default": F.linear, "onednn": onednn_linear}


@dataclass
class Packed:
    """A batch without padding: `[tokens]`."""

    ids: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    #: Where a target is predicted, and the targets.
    target_rows: torch.Tensor
    targets: torch.Tensor
    lengths: list[int]
    contexts: list[int]
    #: `[length, prefix + length]` per row, or one where all rows are alike: added to the scores.
    masks: list[torch.Tensor] = field(default_factory=list)
    #: FlexAttention's.
    block_mask: object = None

    @property
    def alike(self) -> bool:
        return len(set(self.lengths)) == 1 and len(set(self.contexts)) == 1


def pack(model: ChatGlm, rows: list[dict], prefix: int, attention: str) -> Packed:
    """Collates rows one behind the other."""
    device = model.tables[0].device
    ids, positions, target_rows, targets, lengths, contexts = [], [[], []], [], [], [], []
    for row in rows:
        start = len(ids)
        context, outside, inside = places(model.settings, row["input_ids"])
        ids += row["input_ids"]
        positions[0] += outside
        positions[1] += inside
        lengths.append(len(row["input_ids"]))
        contexts.append(context)
        for index, label in enumerate(row["labels"][1:]):
            if label != IGNORED:
                target_rows.append(start + index)
                targets.append(label)
    on = lambda values: torch.tensor(values).to(device, non_blocking=True)
    cos, sin = (model.turns(table, on(positions)) for table in model.tables)
    batch = Packed(on(ids), cos, sin, on(target_rows), on(targets), lengths, contexts)
    if attention == "flex":
        batch.block_mask = block_mask(batch, prefix)
    elif attention == "mask":
        kinds = list(zip(lengths, contexts))[: 1 if batch.alike else None]
        weight = model.transformer.word_embeddings.weight
        batch.masks = [score_mask(length, context, prefix, weight) for length, context in kinds]
    return batch


def score_mask(length: int, context: int, prefix: int, like: torch.Tensor) -> torch.Tensor:
    """Zero where a key is seen and minus infinity where not."""
    mask = torch.zeros(length, prefix + length, dtype=like.dtype, device=like.device)
    mask[:, prefix:].masked_fill_(~visible(length, context, like.device), float("-inf"))
    return mask


def block_mask(batch: Packed, prefix: int):
    """FlexAttention's mask of a packed batch; the prefix stands before all rows."""
    from torch.nn.attention.flex_attention import create_block_mask

    device = batch.ids.device
    lengths = torch.tensor(batch.lengths, device=device)
    of = torch.repeat_interleave(torch.arange(len(batch.lengths), device=device), lengths)
    seen = (lengths.cumsum(0) - lengths + torch.tensor(batch.contexts, device=device))[of]

    def sees(_row, _head, query, key):
        own = (key - prefix).clamp(min=0)
        return (key < prefix) | ((of[own] == of[query]) & ((own <= query) | (own < seen[query])))

    tokens = len(of)
    return create_block_mask(sees, None, None, tokens, prefix + tokens, device=device)


def before_attention(linear, x, norm, eps, qkv, lora, turns, heads):
    """Norm, queries, keys and values, rotation: `[tokens, hidden]` to the normed input and `[tokens, heads, d]`."""
    normed = F.layer_norm(x, x.shape[-1:], *norm, eps)
    mixed = linear(normed, *qkv)
    if lora is not None:
        a, b, scale = lora
        mixed = mixed + F.linear(F.linear(normed, a.to(x.dtype)), b.to(x.dtype)) * scale
    query, key, value = mixed.unflatten(-1, heads).chunk(3, dim=-1)
    return normed, rotate(query, *turns), rotate(key, *turns), value


def after_attention(linear, normed, context, dense, norm, eps, up, down):
    """Output layer, residual, norm and MLP."""
    x = normed * ALPHA + linear(context, *dense)
    normed = F.layer_norm(x, x.shape[-1:], *norm, eps)
    inner = F.gelu(linear(normed, *up), approximate="tanh")
    return normed * ALPHA + linear(inner, *down)


def loss_of(linear, x, norm, eps, head, targets):
    """Last norm, head and mean loss of the rows with a target."""
    x = F.layer_norm(x, x.shape[-1:], *norm, eps)
    return F.cross_entropy(linear(x, head).float(), targets)


def both(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.weight, layer.bias


class PackedForward:
    """Forward of a packed batch over the weights of `model`.

    `lora` is (A, B, scale) per block; `prefix` the parameter `[positions, blocks * 2 * hidden]`.
    """

    def __init__(self, model: ChatGlm, options: Options, lora: list | None, prefix: nn.Parameter | None):
        self.model, self.options, self.lora, self.prefix = model, options, lora, prefix
        self.linear = LINEAR[options.linear]
        compiled = torch.compile if options.compile == "blocks" else lambda function: function
        self.before, self.after = compiled(before_attention), compiled(after_attention)
        self.blocks = torch.compile(self.all_blocks) if options.compile == "whole" else self.all_blocks
        self.loss = loss_of if options.compile == "none" else torch.compile(loss_of)
        if options.attention == "flex":
            from torch.nn.attention.flex_attention import flex_attention

            # Without compilation FlexAttention is a reference that holds all scores.
            self.flex = flex_attention if options.compile == "whole" else torch.compile(flex_attention)

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix is None else self.prefix.shape[0]

    def __call__(self, rows: list[dict]) -> torch.Tensor:
        batch = pack(self.model, rows, self.prefix_length, self.options.attention)
        transformer, config = self.model.transformer, self.model.settings
        x = F.embedding(batch.ids, transformer.word_embeddings.weight)
        x = self.blocks(x, batch)
        norm = both(transformer.final_layernorm)
        head = transformer.word_embeddings.weight
        return self.loss(self.linear, x[batch.target_rows], norm, config.layernorm_epsilon, head, batch.targets)

    def all_blocks(self, x, batch: Packed):
        config = self.model.settings
        past = [None] * config.num_layers
        if self.prefix is not None:
            shape = (self.prefix_length, config.num_layers, 2, config.num_attention_heads, config.head_dim)
            values = self.prefix.view(shape).to(x.dtype)
            past = [values[:, index].unbind(1) for index in range(config.num_layers)]
        for index, block in enumerate(self.model.transformer.layers):
            given = (x, block, batch, self.lora and self.lora[index], past[index])
            if self.options.recompute:
                x = checkpoint(self.block, *given, use_reentrant=False)
            else:
                x = self.block(*given)
        return x

    def block(self, x, block, batch: Packed, lora, past):
        config = self.model.settings
        eps, heads = config.layernorm_epsilon, (config.num_attention_heads, 3 * config.head_dim)
        qkv = both(block.attention.query_key_value)
        normed, query, key, value = self.before(
            self.linear, x, both(block.input_layernorm), eps, qkv, lora, (batch.cos, batch.sin), heads)
        context = self.attention(query, key, value, batch, past)
        return self.after(
            self.linear, normed, context, both(block.attention.dense), both(block.post_attention_layernorm), eps,
            both(block.mlp.dense_h_to_4h), both(block.mlp.dense_4h_to_h))

    def attention(self, query, key, value, batch: Packed, past):
        """`[tokens, heads, head_dim]` to `[tokens, hidden]`."""
        if self.options.attention == "flex":
            if past is not None:
                key, value = torch.cat([past[0], key]), torch.cat([past[1], value])
            query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            out = self.flex(query, key, value, block_mask=batch.block_mask)
            return out[0].transpose(0, 1).flatten(1)
        if batch.alike:
            shape = (len(batch.lengths), batch.lengths[0])
            query, key, value = (x.unflatten(0, shape) for x in (query, key, value))
            return self.rows_alike(query, key, value, 0, batch, past).flatten(0, 1).flatten(1)
        parts = []
        split = zip(*(x.split(batch.lengths) for x in (query, key, value)))
        for index, row in enumerate(split):
            parts.append(self.rows_alike(*(x.unsqueeze(0) for x in row), index, batch, past)[0])
        return torch.cat(parts).flatten(1)

    def rows_alike(self, query, key, value, index: int, batch: Packed, past):
        """Rows of one length and context, `[rows, length, heads, head_dim]`."""
        if past is not None:
            ahead = [x.expand(len(query), -1, -1, -1) for x in past]
            key, value = torch.cat([ahead[0], key], dim=1), torch.cat([ahead[1], value], dim=1)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if self.options.attention == "mask":
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=batch.masks[index])
            return out.transpose(1, 2)
        # The context sees all of itself and the prefix; behind it the mask is causal, aligned at the end.
        context, prefix, length = batch.contexts[index], self.prefix_length, batch.lengths[index]
        seen = prefix + context
        first = F.scaled_dot_product_attention(query[:, :, :context], key[:, :, :seen], value[:, :, :seen])
        causal = causal_lower_right(length - context, prefix + length)
        rest = F.scaled_dot_product_attention(query[:, :, context:], key, value, attn_mask=causal)
        return torch.cat([first, rest], dim=2).transpose(1, 2)
