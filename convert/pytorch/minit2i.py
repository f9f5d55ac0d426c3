"""MiniT2I in PyTorch, written from its description: for comparison, and for the Core ML export.

Parameters have the names of the published file, without its prefix. Pictures are (B, 3, H, W) in
[-1, 1]. Time runs from noise (0) to the picture (1): z = t x + (1 - t) 2 eps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert.pytorch.layers import LEAST_T, norm_scale, velocity_to

PREFIX = "model.net."
THETA = 10000.0
NOISE = 2.0
EPS = 1e-6


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel i with channel i + D/2, as a complex number; x (B, N, heads, D)."""
    real, imaginary = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)


def rates(count: int) -> Tensor:
    """`count` frequencies from 1 down to nearly 1 / THETA."""
    return THETA ** (-torch.arange(count) / count)


def word_angles(length: int, head_dim: int) -> Tensor:
    return torch.outer(torch.arange(length).float(), rates(head_dim // 2))


def picture_angles(side: int, head_dim: int) -> Tensor:
    """A quarter of the channels turns with the row, and a quarter with the column."""
    along = torch.outer(torch.arange(side).float(), rates(head_dim // 4))
    rows, columns = along.repeat_interleave(side, 0), along.repeat(side, 1)
    return torch.cat([rows, columns], dim=-1)


def places(side: int, dims: int) -> Tensor:
    """Added positions (side^2, dims): of the column first, each as sines and then cosines."""
    along = torch.outer(torch.arange(side).float(), rates(dims // 4))
    waves = torch.cat([along.sin(), along.cos()], dim=-1)
    return torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], dim=-1)


class Norm(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dims))
        self.scale = norm_scale(dims)

    def forward(self, x: Tensor) -> Tensor:
        # Divided first, as in `convert.pytorch.layers`.
        x = x * (1 / self.scale)
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS / self.scale**2) * self.weight


class Gate(nn.Module):
    def __init__(self, dims: int, ratio: float):
        super().__init__()
        hidden = 8 * ((int(dims * ratio) + 7) // 8)
        self.w1, self.w3 = (nn.Linear(dims, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, dims, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, heads, D) -> (B, N, heads * D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def three(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, N, 3 * heads * D) -> q, k and v (B, N, heads, D)."""
    b, n, channels = x.shape
    return x.reshape(b, n, 3, heads, channels // (3 * heads)).unbind(2)


class TextBlock(nn.Module):
    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        d, self.heads = sizes["hidden_size"], sizes["num_heads"]
        self.norm1, self.norm2 = Norm(d), Norm(d)
        self.q_norm, self.k_norm = (Norm(sizes["head_dim"]) for _ in range(2))
        self.qkv, self.attn_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = Gate(d, sizes["mlp_ratio"])

    def forward(self, text: Tensor, angles: Tensor) -> Tensor:
        q, k, v = three(self.qkv(self.norm1(text)), self.heads)
        out = attention(turn(self.q_norm(q), angles), turn(self.k_norm(k), angles), v)
        text = text + self.attn_proj(out)
        return text + self.mlp(self.norm2(text))


class JointBlock(nn.Module):
    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        d, self.heads = sizes["hidden_size"], sizes["num_heads"]
        self.q_norm, self.k_norm = (Norm(sizes["head_dim"]) for _ in range(2))
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_norm1", Norm(d))
            self.add_module(f"{stream}_norm2", Norm(d))
            self.add_module(f"{stream}_qkv", nn.Linear(d, 3 * d))
            self.add_module(f"{stream}_attn_proj", nn.Linear(d, d))
            self.add_module(f"{stream}_mlp", Gate(d, sizes["mlp_ratio"]))

    def run(self, layer: str, stream: str, x: Tensor) -> Tensor:
        return self.get_submodule(f"{stream}_{layer}")(x)

    def forward(self, streams: dict[str, Tensor], angles: Tensor) -> dict[str, Tensor]:
        """The streams "txt" and "img", in the order of `angles`."""
        parts = []
        for name, x in streams.items():
            parts.append(self.run("qkv", name, self.run("norm1", name, x)))
        q, k, v = three(torch.cat(parts, dim=1), self.heads)
        out = attention(turn(self.q_norm(q), angles), turn(self.k_norm(k), angles), v)
        pieces = out.split([x.shape[1] for x in streams.values()], dim=1)
        done = {}
        for (name, x), piece in zip(streams.items(), pieces, strict=True):
            x = x + self.run("attn_proj", name, piece)
            done[name] = x + self.run("mlp", name, self.run("norm2", name, x))
        return done


class Patches(nn.Module):
    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        patch = sizes["patch_size"]
        self.proj1 = nn.Conv2d(
            sizes["in_channels"], sizes["pca_channels"], patch, stride=patch, bias=False
        )
        self.proj2 = nn.Conv2d(sizes["pca_channels"], sizes["hidden_size"], 1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.proj2(self.proj1(pictures)).flatten(2).transpose(1, 2)


class Final(nn.Module):
    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        self.norm_final = Norm(sizes["hidden_size"])
        self.linear = nn.Linear(
            sizes["hidden_size"], sizes["patch_size"] ** 2 * sizes["in_channels"]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


class TimeEmbedder(nn.Module):
    """Has no effect; the published file has its weights."""

    def __init__(self, dims: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dims), nn.SiLU(), nn.Linear(dims, dims))


class MiniT2I(nn.Module):
    """Predicts the picture from a noisy one and the text.

    Args:
        sizes: as in config.json.
    """

    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        self.sizes = sizes
        d, text_dims = sizes["hidden_size"], sizes["txt_input_size"]
        self.img_embedder = Patches(sizes)
        self.txt_embedder = nn.Linear(text_dims, d, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, text_dims))
        self.t_embedder = TimeEmbedder(sizes["cond_vec_size"])
        self.pooled_embedder = nn.Linear(text_dims, sizes["cond_vec_size"], bias=False)
        count = sizes["txt_preamble_depth"]
        self.txt_preamble_blocks = nn.ModuleList(TextBlock(sizes) for _ in range(count))
        count = sizes["depth_double"]
        self.double_blocks = nn.ModuleList(JointBlock(sizes) for _ in range(count))
        self.final_layer = Final(sizes)
        self.side = sizes["image_size"] // sizes["patch_size"]
        tables = {
            "places": places(self.side, d),
            "of_words": word_angles(sizes["prompt_length"], sizes["head_dim"]),
            "of_picture": picture_angles(self.side, sizes["head_dim"]),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, pictures: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """pictures (B, 3, S, S), text (B, `prompt_length`, D), mask (B, `prompt_length`)."""
        tables: Any = self
        text = self.txt_embedder(torch.where(mask[..., None] > 0.5, text, self.mask_token))
        for block in self.txt_preamble_blocks:
            text = block(text, tables.of_words)
        streams = {"txt": text, "img": self.img_embedder(pictures) + tables.places}
        angles = torch.cat([tables.of_words, tables.of_picture])
        for block in self.double_blocks:
            streams = block(streams, angles)
        x, patch = self.final_layer(streams["img"]), self.sizes["patch_size"]
        x = x.reshape(len(x), self.side, self.side, patch, patch, self.sizes["in_channels"])
        return x.permute(0, 5, 1, 3, 2, 4).reshape(pictures.shape)

    def velocity(self, pictures: Tensor, t: float, text: Tensor, mask: Tensor) -> Tensor:
        """Towards the picture, in pixels per time."""
        return (self(pictures, text, mask) - pictures) / max(1 - t, LEAST_T)

    @torch.no_grad()
    def draw(
        self, eps: Tensor, text: Tensor, mask: Tensor, *, steps: int, guidance: float
    ) -> Tensor:
        """Pictures from unit noise `eps`, by Euler steps; without text the mask is zero."""
        z = NOISE * eps
        for i in range(steps):
            with_text = self.velocity(z, i / steps, text, mask)
            without = self.velocity(z, i / steps, text, torch.zeros_like(mask))
            z = z + (without + guidance * (with_text - without)) / steps
        return z


def published(network: MiniT2I) -> dict[str, Tensor]:
    """The tensors of the published file."""
    return {PREFIX + name: value.contiguous() for name, value in network.state_dict().items()}


class Velocity(nn.Module):
    """The velocity v = eps - x0 of MLX's network, in its latents: pictures divided by `NOISE`."""

    def __init__(self, network: MiniT2I):
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """x_t (1, 3, S, S), t (1), text (1, L, D), mask (1, L)."""
        x0 = self.network(NOISE * x_t, text, mask) / NOISE
        return velocity_to(x0, x_t, t)
