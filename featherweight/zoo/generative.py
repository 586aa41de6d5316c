"""Decoders that predict the next token: fused attention, and rotary positions with grouped queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.zoo.sequences import WORDS
from featherweight.zoo.transformers import STEPS


class CausalAttention(nn.Module):
    """nanoGPT's `CausalSelfAttention`: fused projection, split by the width."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd = n_head, n_embd

    def forward(self, x: Tensor) -> Tensor:
        """`[n, steps, n_embd]` to the same shape."""
        B, T, C = x.size()  # noqa: N806 - nanoGPT's own names
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))  # type: ignore[no-any-return]


class GPTBlock(nn.Module):
    """Attention and MLP, norms first."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(n_embd), CausalAttention(n_embd, n_head)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, steps, n_embd]` to the same shape."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Decoder-only language model, embedding and output layer tied, as nanoGPT writes it.

    Paper: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019.
    """

    def __init__(self, n_embd: int = 64) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, n_embd)
        self.wpe = nn.Embedding(STEPS, n_embd)
        self.h = nn.ModuleList(GPTBlock(n_embd, 4) for _ in range(2))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, WORDS, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """`[n, steps]` tokens to `[n, steps, 100]`."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """Root-mean-square norm as Llama writes it (Zhang and Sennrich, NeurIPS 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to the same shape."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def _rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


class LlamaAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., EMNLP 2023) with rotary positions (Su et al., 2021)."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[n, steps, dim]` and `[steps, head_dim]` twice to `[n, steps, dim]`."""
        n, steps, _ = x.shape
        q = self.q_proj(x).view(n, steps, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(n, steps, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(n, steps, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin
        repeats = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(x.transpose(1, 2).reshape(n, steps, -1))  # type: ignore[no-any-return]


class LlamaBlock(nn.Module):
    """Attention and a gated MLP (Shazeer, "GLU Variants Improve Transformer", 2020), root-mean-square norms first."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(dim), LlamaAttention(dim, 4, 2)
        self.post_attention_layernorm = RMSNorm(dim)
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[n, steps, dim]` and the rotary tables to `[n, steps, dim]`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        inner = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(inner)) * self.up_proj(inner))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """Decoder with root-mean-square norms, rotary positions, grouped-query attention and gated MLPs.

    Paper: Touvron et al., "Llama 2: Open Foundation and Fine-Tuned Chat Models", 2023.
    """

    def __init__(self, dim: int = 64, hidden: int = 160) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, dim)
        self.layers = nn.ModuleList(LlamaBlock(dim, hidden) for _ in range(2))
        self.norm = RMSNorm(dim)
        self.lm_head = nn.Linear(dim, WORDS, bias=False)
        half = dim // 4 // 2
        angles = torch.outer(torch.arange(STEPS).float(), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[n, 12]` tokens to `[n, 12, 100]`."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.lm_head(self.norm(x))  # type: ignore[no-any-return]
