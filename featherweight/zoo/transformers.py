"""Transformers and a mixer: attention written in every way that is common."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from featherweight.zoo.images import CLASSES
from featherweight.zoo.sequences import WORDS

STEPS = 12


class EncoderClassifier(nn.Module):
    """PyTorch's own encoder over an embedding, averaged over the steps.

    Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.position = nn.Parameter(torch.zeros(1, STEPS, width))
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[n, 12]` tokens to `[n, 10]`."""
        x = self.embedding(tokens) + self.position
        return self.fc(self.encoder(x).mean(dim=1))  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    """torchvision's `EncoderBlock`: `nn.MultiheadAttention` and an MLP, norms first."""

    def __init__(self, num_heads: int, hidden_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln_1 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.dropout = nn.Dropout(0.0)
        self.ln_2 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, mlp_dim), nn.GELU(), nn.Dropout(0.0), nn.Linear(mlp_dim, hidden_dim), nn.Dropout(0.0)
        )

    def forward(self, input: Tensor) -> Tensor:
        """`[n, steps, hidden_dim]` to the same shape."""
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x) + input
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Vision transformer as torchvision writes it, its width read in the forward.

    Paper: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """

    def __init__(self, hidden_dim: int = 64, patch_size: int = 8, image_size: int = 32) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.hidden_dim = image_size, patch_size, hidden_dim
        self.conv_proj = nn.Conv2d(3, hidden_dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        length = (image_size // patch_size) ** 2 + 1
        self.pos_embedding = nn.Parameter(torch.empty(1, length, hidden_dim).normal_(std=0.02))
        self.layers = nn.Sequential(*(EncoderBlock(4, hidden_dim, 128) for _ in range(2)))
        self.ln = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.heads = nn.Linear(hidden_dim, CLASSES)

    def _process_input(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        n_h, n_w = h // self.patch_size, w // self.patch_size
        x = self.conv_proj(x)
        x = x.reshape(n, self.hidden_dim, n_h * n_w)
        return x.permute(0, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, 32, 32]` to `[n, 10]`."""
        x = self._process_input(x)
        n = x.shape[0]
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1)
        x = self.ln(self.layers(x + self.pos_embedding))
        return self.heads(x[:, 0])  # type: ignore[no-any-return]


class FusedAttention(nn.Module):
    """timm's `Attention`: one linear layer makes queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, steps, dim]` to the same shape."""
        B, N, C = x.shape  # noqa: N806 - timm's own names
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        x = attn.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))  # type: ignore[no-any-return]


class TimmBlock(nn.Module):
    """timm's `Block`: attention and MLP with layer scale."""

    def __init__(self, dim: int, num_heads: int, mlp: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = FusedAttention(dim, num_heads)
        self.gamma1 = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim)
        self.fc1, self.act, self.fc2 = nn.Linear(dim, mlp), nn.GELU(), nn.Linear(mlp, dim)
        self.gamma2 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, steps, dim]` to the same shape."""
        x = x + self.attn(self.norm1(x)) * self.gamma1
        return x + self.fc2(self.act(self.fc1(self.norm2(x)))) * self.gamma2  # type: ignore[no-any-return]


class TimmVisionTransformer(nn.Module):
    """Vision transformer as timm writes it, with fused queries, keys and values.

    Paper: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; layer scale: Touvron et al., "Going Deeper with Image
    Transformers", ICCV 2021.
    """

    def __init__(self, dim: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.blocks = nn.Sequential(*(TimmBlock(dim, 4, 128) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, 32, 32]` to `[n, 10]`."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(x[:, 0])  # type: ignore[no-any-return]


class MixerBlock(nn.Module):
    """An MLP over the tokens, then one over the channels."""

    def __init__(self, dim: int, tokens: int, token_dim: int, channel_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token_mix = nn.Sequential(nn.Linear(tokens, token_dim), nn.GELU(), nn.Linear(token_dim, tokens))
        self.channel_mix = nn.Sequential(nn.Linear(dim, channel_dim), nn.GELU(), nn.Linear(channel_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, tokens, dim]` to the same shape."""
        x = x + self.token_mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mix(self.norm2(x))  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """MLP-Mixer.

    Paper: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", NeurIPS 2021.
    """

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 8, 8)
        self.blocks = nn.Sequential(*(MixerBlock(dim, 16, 32, 128) for _ in range(3)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, 32, 32]` to `[n, 10]`."""
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))  # type: ignore[no-any-return]


class WindowAttention(nn.Module):
    """Attention inside windows with a table of relative position biases."""

    def __init__(self, dim: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = 1 / math.sqrt(dim // num_heads)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("relative_position_index", apart[..., 0] * (2 * window - 1) + apart[..., 1])
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`[windows, tokens, dim]` to the same shape; the mask is `[kinds, tokens, tokens]`."""
        B_, N, C = x.shape  # noqa: N806 - the authors' own names
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.get_buffer("relative_position_index").view(-1)]
        attn = attn + bias.view(N, N, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            kinds = mask.shape[0]
            attn = attn.view(B_ // kinds, kinds, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj(x)  # type: ignore[no-any-return]


class SwinBlock(nn.Module):
    """Windows, shifted in every second block, and an MLP."""

    def __init__(self, dim: int, size: int, num_heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.size, self.window, self.shift = size, window, shift
        self.norm1, self.attn = nn.LayerNorm(dim), WindowAttention(dim, window, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        mask = None
        if shift:
            region = torch.zeros(size)
            region[size - window : size - shift], region[size - shift :] = 1, 2
            windows = self._partition((3 * region[:, None] + region[None, :]).view(1, size, size, 1)).squeeze(-1)
            mask = (windows[:, None, :] != windows[:, :, None]).float() * -100.0
        self.register_buffer("attn_mask", mask, persistent=False)

    def _partition(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape  # noqa: N806 - the authors' own names
        x = x.view(B, H // self.window, self.window, W // self.window, self.window, C)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, self.window * self.window, C)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, size * size, dim]` to the same shape."""
        B, L, C = x.shape  # noqa: N806 - the authors' own names
        shortcut, side = x, self.size
        x = self.norm1(x).view(B, side, side, C)
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = self.attn(self._partition(x), self.attn_mask)
        x = windows.view(-1, side // self.window, side // self.window, self.window, self.window, C)
        x = x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, side, side, C)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + x.view(B, L, C)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class PatchMerging(nn.Module):
    """Each square of four tokens to one of twice the width."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, size * size, dim]` to `[n, size * size / 4, 2 * dim]`."""
        B, _, C = x.shape  # noqa: N806 - the authors' own names
        x = x.view(B, self.size, self.size, C)
        parts = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        return self.reduction(self.norm(torch.cat(parts, -1).view(B, -1, 4 * C)))  # type: ignore[no-any-return]


class Swin(nn.Module):
    """Two stages of shifted windows, written as the authors and timm write them.

    Paper: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.
    """

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.patch_norm = nn.LayerNorm(dim)
        self.stage1 = nn.Sequential(SwinBlock(dim, 8, 2, 4, 0), SwinBlock(dim, 8, 2, 4, 2))
        self.merge = PatchMerging(dim, 8)
        self.stage2 = nn.Sequential(SwinBlock(2 * dim, 4, 4, 4, 0), SwinBlock(2 * dim, 4, 4, 4, 0))
        self.norm = nn.LayerNorm(2 * dim)
        self.head = nn.Linear(2 * dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, 32, 32]` to `[n, 10]`."""
        x = self.patch_norm(self.patch_embed(x).flatten(2).transpose(1, 2))
        x = self.norm(self.stage2(self.merge(self.stage1(x))))
        return self.head(x.mean(dim=1))  # type: ignore[no-any-return]
