"""Z-Image's transformer (diffusers' ZImageTransformer2DModel).

Picture and caption are refined separately, then processed as one sequence by one stream of blocks.
In RoPE the caption has the frames 1, 2, ..., and the picture has the frame after it. Both are
padded to a multiple of 32 with learned tokens, which are attended to like all others.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_snapgen.networks.attention import attend_all
from mlx_snapgen.networks.exponentials import silu
from mlx_snapgen.networks.layers import (
    checkpointed,
    depth_to_space,
    layer_norm,
    merge_heads,
    sinusoids,
    space_to_depth,
    split,
    split_heads,
)
from mlx_snapgen.networks.rope import Rope, axis_frequencies, rotate, token_grid
from mlx_snapgen.public_config import ZImageTransformerConfig

MULTIPLE = 32
"""Picture and caption are padded to multiples of this number of tokens."""


class TimestepEmbedder(nn.Module):
    def __init__(self, config: ZImageTransformerConfig):
        super().__init__()
        self.mlp = [
            nn.Linear(config.frequency_dim, config.time_hidden),
            nn.SiLU(),
            nn.Linear(config.time_hidden, config.time_dims),
        ]
        self._frequency_dim = config.frequency_dim

    def __call__(self, t: mx.array, dtype: mx.Dtype) -> mx.array:
        x = sinusoids(t, self._frequency_dim).astype(dtype)
        return self.mlp[2](silu(self.mlp[0](x)))


class Attention(nn.Module):
    def __init__(self, dims: int, num_heads: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dims, dims, bias=False) for _ in range(3))
        self.to_out = [nn.Linear(dims, dims, bias=False)]
        self._head_dim = dims // num_heads
        self.norm_q, self.norm_k = (nn.RMSNorm(self._head_dim, eps=1e-5) for _ in range(2))

    def __call__(
        self, x: mx.array, rope: Rope, *, mask: mx.array | None, save_memory: bool = False
    ) -> mx.array:
        q, k, v = (split_heads(f(x), self._head_dim) for f in (self.to_q, self.to_k, self.to_v))
        q, k = rotate(self.norm_q(q), *rope), rotate(self.norm_k(k), *rope)
        out = attend_all(q, k, v, mask=mask, save_memory=save_memory)
        return self.to_out[0](merge_heads(out))


class FeedForward(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        hidden = int(dims / 3 * 8)
        self.w1 = nn.Linear(dims, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dims, bias=False)
        self.w3 = nn.Linear(dims, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """RMS norms before and after attention and FFN; scales and tanh gates from the time."""

    def __init__(self, config: ZImageTransformerConfig, modulated: bool = True):
        super().__init__()
        d, eps = config.hidden_size, config.norm_eps
        self.attention = Attention(d, config.num_heads)
        self.feed_forward = FeedForward(d)
        self.attention_norm1, self.attention_norm2 = (nn.RMSNorm(d, eps=eps) for _ in range(2))
        self.ffn_norm1, self.ffn_norm2 = (nn.RMSNorm(d, eps=eps) for _ in range(2))
        if modulated:
            self.adaLN_modulation = [nn.Linear(config.time_dims, 4 * d)]

    def __call__(
        self,
        x: mx.array,
        rope: Rope,
        *,
        mask: mx.array | None,
        embedding: mx.array | None = None,
        save_memory: bool = False,
    ) -> mx.array:
        """x (B, N, d), mask (B, 1, 1, N), embedding of the time (B, time_dims) if modulated."""
        scale_a = gate_a = scale_f = gate_f = 1.0
        if embedding is not None:
            modulation = self.adaLN_modulation[0](embedding)[:, None]
            scale_a, gate_a, scale_f, gate_f = split(modulation, 4, axis=-1)
            scale_a, scale_f = 1 + scale_a, 1 + scale_f
            gate_a, gate_f = mx.tanh(gate_a), mx.tanh(gate_f)
        h = self.attention_norm1(x) * scale_a
        out = self.attention(h, rope, mask=mask, save_memory=save_memory)
        x = x + gate_a * self.attention_norm2(out)
        return x + gate_f * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * scale_f))


class FinalLayer(nn.Module):
    def __init__(self, config: ZImageTransformerConfig, out_dims: int):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, out_dims)
        self.adaLN_modulation = [nn.SiLU(), nn.Linear(config.time_dims, config.hidden_size)]

    def __call__(self, x: mx.array, embedding: mx.array) -> mx.array:
        activate, linear = self.adaLN_modulation
        return self.linear(layer_norm(x) * (1 + linear(activate(embedding)))[:, None])


class ZImageTransformer(nn.Module):
    """Velocity v = eps - x0 of Z-Image's latents (the public network returns -v)."""

    BLOCKS = ("noise_refiner", "context_refiner", "layers")
    """Path of the layers that may be quantized."""

    def __init__(self, config: ZImageTransformerConfig):
        super().__init__()
        self.config = config
        self._checkpoint = False
        d, patch = config.hidden_size, config.patch_size
        packed, self._key = config.latent_channels * patch**2, f"{patch}-1"
        # The public keys are named after the patch size in space and in time.
        self.all_x_embedder = {self._key: nn.Linear(packed, d)}
        self.all_final_layer = {self._key: FinalLayer(config, packed)}
        self.noise_refiner = [Block(config) for _ in range(config.num_refiner_layers)]
        self.context_refiner = [Block(config, False) for _ in range(config.num_refiner_layers)]
        self.t_embedder = TimestepEmbedder(config)
        self.cap_embedder = [
            nn.RMSNorm(config.text_dims, eps=config.norm_eps),
            nn.Linear(config.text_dims, d),
        ]
        self.x_pad_token, self.cap_pad_token = mx.zeros((1, d)), mx.zeros((1, d))
        self.layers = [Block(config) for _ in range(config.num_layers)]

    def checkpoint_blocks(self, enabled: bool = True) -> None:
        """See `VelocityNetwork.checkpoint_blocks`."""
        self._checkpoint = enabled

    @property
    def dtype(self) -> mx.Dtype:
        """Floating type of the weights."""
        return self.x_pad_token.dtype

    def __call__(
        self,
        x_t: mx.array,
        t: mx.array,
        text: mx.array,
        mask: mx.array | None = None,
        *,
        return_features: bool = False,
    ) -> Any:
        """See `VelocityNetwork.__call__`."""
        patch = self.config.patch_size
        b, height, width, _ = x_t.shape
        grid = token_grid(height, width, patch)
        embedding = self.t_embedder(1 - t.astype(mx.float32), self.dtype)
        cap, cap_mask, cap_lengths = self._caption(text, mask)
        cap_rope = self._rope(np.arange(1, cap.shape[1] + 1)[:, None] * np.array([1, 0, 0]))
        for block in self.context_refiner:
            cap = self._run(block, {"x": cap}, rope=cap_rope, mask=cap_mask)

        x = space_to_depth(x_t, patch).reshape(b, grid[0] * grid[1], -1).astype(self.dtype)
        x = self.all_x_embedder[self._key](x)
        count, fill = x.shape[1], -x.shape[1] % MULTIPLE
        filling = mx.broadcast_to(self.x_pad_token, (b, fill, x.shape[2]))
        x = mx.concatenate([x, filling], axis=1)
        rope = self._picture_rope(grid, fill, cap_lengths)
        for block in self.noise_refiner:
            x = self._run(block, {"x": x, "embedding": embedding}, rope=rope, mask=None)

        cos, sin = (
            mx.concatenate([part, mx.broadcast_to(of_cap, (b, 1, *of_cap.shape))], axis=2)
            for part, of_cap in zip(rope, cap_rope, strict=True)
        )
        everywhere = mx.ones((b, 1, 1, x.shape[1]), mx.bool_)
        mask = mx.concatenate([everywhere, cap_mask], axis=-1)
        x = mx.concatenate([x, cap], axis=1)
        for block in self.layers:
            x = self._run(block, {"x": x, "embedding": embedding}, rope=(cos, sin), mask=mask)
        x = x[:, :count]
        v = -self.all_final_layer[self._key](x, embedding)
        v = depth_to_space(v.reshape(b, *grid, -1), patch).astype(x_t.dtype)
        return (v, x.astype(x_t.dtype)) if return_features else v

    def _run(
        self, block: Block, inputs: dict[str, Any], *, rope: Rope, mask: mx.array | None
    ) -> mx.array:
        if self._checkpoint:
            return checkpointed(block, inputs, rope=rope, mask=mask, save_memory=True)
        return block(**inputs, rope=rope, mask=mask)

    def _caption(
        self, text: mx.array, mask: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Embedded captions (B, L, d) with L a multiple of 32, mask, padded lengths (B,)."""
        b, length, _ = text.shape
        if mask is None:
            mask = mx.ones((b, length), mx.bool_)
        fill = -length % MULTIPLE
        text, mask = mx.pad(text, [(0, 0), (0, fill), (0, 0)]), mx.pad(mask, [(0, 0), (0, fill)])
        norm, linear = self.cap_embedder
        cap = mx.where(mask[..., None], linear(norm(text.astype(self.dtype))), self.cap_pad_token)
        counts = mask.astype(mx.int32).sum(axis=1)
        lengths = (counts + MULTIPLE - 1) // MULTIPLE * MULTIPLE
        seen = mx.arange(cap.shape[1]) < lengths[:, None]
        return cap, seen[:, None, None], lengths

    def _rope(self, positions: np.ndarray) -> Rope:
        """Cosines and sines (N, head_dim/2) of positions (N, 3)."""
        frequencies = axis_frequencies(self.config.rope_axes, self.config.rope_theta)
        angles = [positions[:, i : i + 1] * f for i, f in enumerate(frequencies)]
        angles = np.concatenate(angles, axis=-1)
        return mx.array(np.cos(angles), mx.float32), mx.array(np.sin(angles), mx.float32)

    def _picture_rope(self, grid: tuple[int, int], fill: int, cap_lengths: mx.array) -> Rope:
        """(B, 1, N + fill, head_dim/2): the picture after its caption, its padding at 0."""
        rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
        frequencies = axis_frequencies(self.config.rope_axes, self.config.rope_theta)
        frames, *others = (mx.array(f, mx.float32) for f in frequencies)
        frame = (cap_lengths + 1).astype(mx.float32)[:, None, None] * frames
        parts = [mx.broadcast_to(frame, (len(frame), len(rows), frame.shape[-1]))]
        for positions, f in zip((rows, columns), others, strict=True):
            angles = mx.array(positions, mx.float32)[:, None] * f
            parts.append(mx.broadcast_to(angles, (len(frame), *angles.shape)))
        angles = mx.concatenate(parts, axis=-1)
        angles = mx.pad(angles, [(0, 0), (0, fill), (0, 0)])[:, None]
        return mx.cos(angles), mx.sin(angles)
