"""The Efficient DiT: three stages, Down -> Middle -> Up, over one elastic set of weights.

Blocks are PixArt-alpha's: modulated self-attention, cross-attention to the text without norm or
gate, modulated FFN; one timestep projection shared by all blocks (adaLN-single) plus a learned
table in each. Down and Up run ASSA on the full token grid. Middle runs dense attention on a quarter
of the tokens, with long skip connections.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import TransformerConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.attention import CrossAttention, Grid, SelfAttention, SparseSelfAttention
from mlx_snapgen.networks.base import velocity_to
from mlx_snapgen.networks.elastic import ElasticLinear, PerWidth, Table
from mlx_snapgen.networks.exponentials import gelu, silu
from mlx_snapgen.networks.layers import (
    checkpointed,
    depth_to_space,
    flat_parameters,
    layer_norm,
    modulate,
    sinusoids,
    space_to_depth,
    split,
)
from mlx_snapgen.networks.parallel import by_tokens
from mlx_snapgen.networks.products import by_pictures, pictures_apart
from mlx_snapgen.networks.text_encoders.base import (
    Prompt,
    TextEncoder,
    TextStates,
    encode_states,
)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> embedding (B, dims) of sinusoids of 1000 t through an MLP."""

    def __init__(self, frequency_dim: int, dims: int):
        super().__init__()
        self.linear1 = nn.Linear(frequency_dim, dims)
        self.linear2 = nn.Linear(dims, dims)
        self._frequency_dim = frequency_dim

    def __call__(self, t: mx.array) -> mx.array:
        x = sinusoids(t, self._frequency_dim)
        return self.linear2(silu(self.linear1(x.astype(self.linear1.bias.dtype))))


class AdaLNSingle(nn.Module):
    """The one timestep projection shared by all blocks: t -> (B, dims) and (B, 6, dims)."""

    def __init__(self, frequency_dim: int, dims: int):
        super().__init__()
        self.embedder = TimestepEmbedder(frequency_dim, dims)
        self.linear = nn.Linear(dims, 6 * dims)
        # Zero gates: every block starts as the identity (adaLN-zero).
        self.linear.weight = mx.zeros_like(self.linear.weight)
        self.linear.bias = mx.zeros_like(self.linear.bias)

    def __call__(self, t: mx.array) -> tuple[mx.array, mx.array]:
        embedding = self.embedder(t)
        modulation = self.linear(silu(embedding))
        return embedding, modulation.reshape(t.shape[0], 6, -1)


class FeedForward(nn.Module):
    def __init__(self, dims: int, ratio: float):
        super().__init__()
        self.linear1 = ElasticLinear(dims, round(dims * ratio))
        self.linear2 = ElasticLinear(round(dims * ratio), dims)

    def __call__(self, x: mx.array, share: float) -> mx.array:
        return self.linear2(gelu(self.linear1(x, share)), share)


class Block(nn.Module):
    """PixArt-alpha block at one stage's resolution."""

    def __init__(self, config: TransformerConfig, ffn_ratio: float, sparse: bool):
        super().__init__()
        d = config.hidden_size
        self.self_attention = (SparseSelfAttention if sparse else SelfAttention)(config)
        self.cross_attention = CrossAttention(config)
        self.ffn = FeedForward(d, ffn_ratio)
        self.modulation = PerWidth(config.widths, lambda w: Table(6, round(d * w)))

    def __call__(
        self,
        x: mx.array,
        modulation: mx.array,
        text: mx.array,
        *,
        mask: mx.array | None,
        grid: Grid,
        share: float,
        modulate_attention: bool = False,
        save_memory: bool = False,
    ) -> mx.array:
        """x (B, N, d) on `grid`, modulation (B, 6, d), text (B, L, text_width), mask (B, L).

        `save_memory` is that of `attention.attend_all`.
        """
        table = self.modulation(share=share) + modulation
        # six of (B, 1, d)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = split(table, 6, axis=1)
        h = by_tokens(lambda x: modulate(layer_norm(x), shift_a, scale_a), x)
        x = x + gate_a * self.self_attention(
            h, grid, share=share, modulate=modulate_attention, save_memory=save_memory
        )
        x = x + self.cross_attention(x, text, mask=mask, share=share, save_memory=save_memory)

        def fed_forward(x: mx.array) -> mx.array:
            h = modulate(layer_norm(x), shift_f, scale_f)
            return x + gate_f * self.ffn(h, share)

        return by_tokens(fed_forward, x)


class LongSkip(nn.Module):
    """Concatenate with an earlier output and project 2d -> d (U-ViT); initialized to ignore it."""

    def __init__(self, dims: int):
        super().__init__()
        self.linear = ElasticLinear(2 * dims, dims, in_groups=2)
        self.linear.weight = mx.concatenate([mx.eye(dims), mx.zeros((dims, dims))], axis=1)

    def __call__(self, x: mx.array, skip: mx.array, *, share: float) -> mx.array:
        return self.linear(mx.concatenate([x, skip], axis=-1), share)


class Downsample(nn.Module):
    """2x2 cells of tokens -> one token: concatenate, bias-free linear 4d -> d."""

    def __init__(self, dims: int):
        super().__init__()
        self.linear = ElasticLinear(4 * dims, dims, bias=False, in_groups=4)

    def __call__(
        self, x: mx.array, grid: Grid, *, share: float, keep: mx.array | None = None
    ) -> mx.array:
        """x (B, N, d) -> (B, N/4, d); tokens where `keep` (B, N) is false are zero."""
        b, n, d = x.shape
        if keep is not None:
            x = mx.where(keep[..., None], x, 0)
        cells = space_to_depth(x.reshape(b, grid.height, grid.width, d), 2)
        return self.linear(cells.reshape(b, n // 4, 4 * d), share)


class Upsample(nn.Module):
    """One token -> a 2x2 cell (linear d -> 4d), then a learned mix with the Down stage's output."""

    def __init__(self, dims: int):
        super().__init__()
        self.linear = ElasticLinear(dims, 4 * dims, bias=False, out_groups=4)
        self.skip_weight = mx.array([0.5])

    def __call__(self, x: mx.array, skip: mx.array, *, grid: Grid, share: float) -> mx.array:
        """x (B, N/4, d) of the Middle stage, skip (B, N, d) of the Down stage on `grid`."""
        b, n, d = x.shape
        cells = self.linear(x, share).reshape(b, grid.height // 2, grid.width // 2, 4 * d)
        x = depth_to_space(cells, 2).reshape(b, 4 * n, d)
        return skip + self.skip_weight * (x - skip)


class TextProjection(nn.Module):
    """States of one encoder to the width that all encoders share: RMS norm, then a linear layer."""

    def __init__(self, dims: int, text_width: int):
        super().__init__()
        self.norm = nn.RMSNorm(dims)
        self.linear = nn.Linear(dims, text_width)

    def __call__(self, states: mx.array) -> mx.array:
        return self.linear(self.norm(states))


class Head(nn.Module):
    """Modulated norm and the linear layer to what is predicted of a patch."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        d, out = config.hidden_size, config.patch_size**2 * config.latent_channels
        self.modulation = PerWidth(config.widths, lambda w: Table(2, round(d * w)))
        self.linear = ElasticLinear(d, out, slice_out=False)
        self.linear.weight = mx.zeros_like(self.linear.weight)

    def __call__(self, x: mx.array, embedding: mx.array, *, share: float) -> mx.array:
        shift, scale = split(self.modulation(share=share) + embedding[:, None], 2, axis=1)
        return self.linear(modulate(layer_norm(x), shift, scale), share)


class EfficientDiT(nn.Module):
    """Velocity v = eps - x0 of latents x_t = (1 - t) x0 + t eps (SnapGen++ section 3).

    One instance contains every width in `config.widths`; `elastic.extract` copies one.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self._checkpoint = False
        d, sparse = config.hidden_size, config.sparse_attention
        down, middle, up = config.blocks
        self.patch_embed = ElasticLinear(
            config.patch_size**2 * config.latent_channels, d, slice_in=False
        )
        self.time = PerWidth(
            config.widths, lambda w: AdaLNSingle(config.frequency_dim, round(d * w))
        )
        self.text = [TextProjection(dims, config.text_width) for dims in config.text_dims]
        self.down_blocks = [Block(config, config.ffn_ratio[0], sparse) for _ in range(down)]
        if middle:
            self.downsample = Downsample(d)
            self.middle_blocks = [Block(config, config.ffn_ratio[1], False) for _ in range(middle)]
            if config.long_skips:
                self.long_skips = [LongSkip(d) for _ in range(middle // 2)]
            self.upsample = Upsample(d)
            self.up_blocks = [Block(config, config.ffn_ratio[2], sparse) for _ in range(up)]
        self.head = Head(config)

    @property
    def dtype(self) -> mx.Dtype:
        """Floating type of the weights."""
        # A norm's weight is never quantized.
        return self.text[0].norm.weight.dtype

    @property
    def is_untrained(self) -> bool:
        """Whether the head has its first weights, zeros: the pictures would be noise."""
        weight = self.head.linear.weight
        return mx.issubdtype(weight.dtype, mx.floating) and not weight.any().item()

    def checkpoint_blocks(self, enabled: bool = True) -> None:
        """See `VelocityNetwork.checkpoint_blocks`."""
        self._checkpoint = enabled

    def encode_text(self, states: Sequence[TextStates | None]) -> tuple[mx.array, mx.array]:
        """Project each encoder's states and join them token-wise.

        Args:
            states: one for each of `config.text_dims`, in order. An encoder whose mask is all
                false is ignored; None, for an absent encoder, has the same effect at a lower cost.

        Returns:
            text (B, L, text_width) and mask (B, L), L the sum of the encoders' lengths.
        """
        if len(states) != len(self.text):
            raise UserError(f"{len(self.text)} text encoders expected, got {len(states)}")
        present = [(p, s) for p, s in zip(self.text, states, strict=True) if s is not None]
        if not present:
            raise UserError("all text encoders are absent: at least one is needed")
        projected = [project(s) for project, (s, _) in present]
        masks = [mask for _, (_, mask) in present]
        return mx.concatenate(projected, axis=1), mx.concatenate(masks, axis=1)

    def __call__(
        self,
        x_t: mx.array,
        t: mx.array,
        text: mx.array,
        mask: mx.array | None = None,
        *,
        share: float = 1.0,
        return_features: bool = False,
        modulate_attention: bool = False,
        keep: mx.array | None = None,
    ) -> Any:
        """Predict the velocity; see `VelocityNetwork.__call__`.

        Args:
            x_t: H and W must divide by twice the patch size.
            t: inside `apart` the same for all pictures.
            text: joined states (B, L, text_width) from `encode_text`. Where no token of a picture
                counts, cross-attention adds nothing.
            share: one of `config.widths`.
            return_features: their width is share * hidden_size.
            modulate_attention: EDT's attention modulation, in every second block of the Up stage.
            keep: (B, N) over patch tokens; where false a token is masked on its way to the Middle
                stage (EDT's masking training). None keeps all.
        """
        config = self.config
        config.width_index(share)
        b, height, row, _ = x_t.shape
        patch = config.patch_size
        if height % (unit := 2 * patch) or row % unit:
            raise UserError(
                f"latents of {height}x{row} do not divide by {unit}: choose another picture size"
            )
        grid = Grid(height // patch, row // patch)
        x = space_to_depth(x_t, patch).reshape(b, grid.height * grid.width, -1)
        x = self.patch_embed(x.astype(self.patch_embed.bias.dtype), share)
        count = pictures_apart()
        embedding, modulation = self.time(t[::count], share=share)
        if count > 1:
            embedding, modulation = (mx.repeat(a, count, axis=0) for a in (embedding, modulation))

        def run(block: Block, x: mx.array, grid: Grid, modulated: bool = False) -> mx.array:
            settings = {"grid": grid, "share": share, "modulate_attention": modulated}
            if self._checkpoint:
                inputs = {"x": x, "modulation": modulation, "text": text}
                return checkpointed(block, inputs, mask=mask, save_memory=True, **settings)
            return by_pictures(
                lambda x, modulation, text, mask: block(x, modulation, text, mask=mask, **settings),
                *(x, modulation, text, mask),
            )

        for block in self.down_blocks:
            x = run(block, x, grid)
        if config.blocks[1]:
            skip = x
            x = self.downsample(x, grid, share=share, keep=keep)
            x = self._middle(x, lambda block, x: run(block, x, grid.halved()), share)
            x = self.upsample(x, skip, grid=grid, share=share)
            for i, block in enumerate(self.up_blocks):
                x = run(block, x, grid, modulate_attention and i % 2 == 1)
        found = self.head(x, embedding, share=share)
        found = depth_to_space(found.reshape(b, grid.height, grid.width, -1), patch)
        if config.prediction == "velocity":
            v = found.astype(x_t.dtype)
        else:
            v = velocity_to(found, x_t, t)
        return (v, x.astype(x_t.dtype)) if return_features else v

    def _middle(
        self, x: mx.array, run: Callable[[Block, mx.array], mx.array], share: float
    ) -> mx.array:
        """Middle stage: block i's output returns at the input of block n - 1 - i."""
        count = len(self.middle_blocks)
        outputs: list[mx.array] = []
        for i, block in enumerate(self.middle_blocks):
            mirrored = count - 1 - i
            if self.config.long_skips and mirrored < i:
                x = self.long_skips[i - (count + 1) // 2](x, outputs[mirrored], share=share)
            x = run(block, x)
            outputs.append(x)
        return x


def count_parameters(config: TransformerConfig) -> int:
    """Parameters of a network of `config`; mlx arrays are lazy, so nothing is allocated."""
    return sum(p.size for p in flat_parameters(EfficientDiT(config)).values())


def encode_prompts(
    prompts: Sequence[Prompt], encoders: Sequence[TextEncoder | None], *, transformer: EfficientDiT
) -> tuple[mx.array, mx.array]:
    """Prompts -> text (B, L, text_width) and mask (B, L), all encoders joined by the transformer.

    None in `prompts` is absent text, None in `encoders` an absent encoder.
    """
    return transformer.encode_text(encode_states(prompts, encoders, dtype=transformer.dtype))
