"""Attention of Qwen-Image and FLUX.2 over picture and text."""

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.networks.attention import attend_all
from mlx_snapgen.networks.layers import merge_heads, split_heads
from mlx_snapgen.networks.rope import Rope, rotate


class JointAttention(nn.Module):
    """Attention over both streams at once, text first; RMS norm of q and k per head."""

    def __init__(self, dims: int, head_dim: int, *, bias: bool):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dims, dims, bias=bias) for _ in range(3))
        self.to_out = [nn.Linear(dims, dims, bias=bias)]
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            nn.Linear(dims, dims, bias=bias) for _ in range(3)
        )
        self.to_add_out = nn.Linear(dims, dims, bias=bias)
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
        self._head_dim = head_dim

    def __call__(
        self,
        picture: mx.array,
        text: mx.array,
        *,
        rope: Rope,
        mask: mx.array | None,
        save_memory: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """picture (B, N, d), text (B, L, d), mask (B, 1, 1, L + N) -> the same two shapes."""

        def heads(of_text: mx.array, of_picture: mx.array) -> tuple[mx.array, mx.array]:
            return split_heads(of_text, self._head_dim), split_heads(of_picture, self._head_dim)

        q_text, q = heads(self.add_q_proj(text), self.to_q(picture))
        k_text, k = heads(self.add_k_proj(text), self.to_k(picture))
        v = mx.concatenate([*heads(self.add_v_proj(text), self.to_v(picture))], axis=2)
        q = mx.concatenate([self.norm_added_q(q_text), self.norm_q(q)], axis=2)
        k = mx.concatenate([self.norm_added_k(k_text), self.norm_k(k)], axis=2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        out = merge_heads(attend_all(q, k, v, mask=mask, save_memory=save_memory))
        length = text.shape[1]
        return self.to_out[0](out[:, length:]), self.to_add_out(out[:, :length])
