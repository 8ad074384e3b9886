"""What is the network? A small Llama in PyTorch, with llama.cpp's interleaved rotary positions."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class ModelShape:
    """The sizes that make the network; the defaults are the shipped model's."""

    vocabulary_size: int = 768
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 384
    context_tokens: int = 1024
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        """Return the width of one attention head."""
        return self.width // self.heads


_INIT_STD: Final = 0.02


class DemoModel(nn.Module):
    """A decoder with tied embeddings; called with ids (batch, time), it returns hidden states."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RmsNorm(shape.width, shape.norm_epsilon)
        cos, sin = rotation_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=_INIT_STD)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the normed hidden states, (batch, time, width)."""
        hidden = self.embedding(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden, cos, sin)
        normed: Tensor = self.norm(hidden)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states."""
        return functional.linear(hidden, self.embedding.weight)


class Block(nn.Module):
    """Attention and a gated feed-forward part, each behind its norm."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        width, kv_width = shape.width, shape.kv_heads * shape.head_width
        self.attn_norm = RmsNorm(width, shape.norm_epsilon)
        self.attn_q = nn.Linear(width, width, bias=False)
        self.attn_k = nn.Linear(width, kv_width, bias=False)
        self.attn_v = nn.Linear(width, kv_width, bias=False)
        self.attn_output = nn.Linear(width, width, bias=False)
        self.ffn_norm = RmsNorm(width, shape.norm_epsilon)
        self.ffn_gate = nn.Linear(width, shape.feed_forward, bias=False)
        self.ffn_up = nn.Linear(width, shape.feed_forward, bias=False)
        self.ffn_down = nn.Linear(shape.feed_forward, width, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the hidden states after this block."""
        hidden = hidden + self._attend(self.attn_norm(hidden), cos, sin)
        normed = self.ffn_norm(hidden)
        gated = functional.silu(self.ffn_gate(normed)) * self.ffn_up(normed)
        result: Tensor = hidden + self.ffn_down(gated)
        return result

    def _attend(self, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = self.shape
        batch, time, _ = normed.shape

        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.view(batch, time, heads, shape.head_width).transpose(1, 2)

        query = rotate(split(self.attn_q(normed), shape.heads), cos, sin)
        key = rotate(split(self.attn_k(normed), shape.kv_heads), cos, sin)
        value = split(self.attn_v(normed), shape.kv_heads)
        groups = shape.heads // shape.kv_heads
        mixed = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            is_causal=True,
        )
        projected: Tensor = self.attn_output(mixed.transpose(1, 2).reshape(batch, time, -1))
        return projected


class RmsNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `hidden`, normed along its last dimension."""
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


def rotation_tables(shape: ModelShape) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, (context, head width / 2)."""
    half = torch.arange(0, shape.head_width, 2, dtype=torch.float64) / shape.head_width
    angles = torch.outer(torch.arange(shape.context_tokens, dtype=torch.float64), shape.rope_base**-half)
    return angles.cos().float(), angles.sin().float()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs by their position's angle.

    llama.cpp turns neighbours in files of architecture `llama`, so that q and k need no permuting
    on export.
    """
    even, odd = heads[..., 0::2], heads[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
