"""The Efficient DiT in PyTorch, at one width and one resolution: the twin of the MLX network.

For PyTorch users, and for the Core ML export, which traces it: shapes, RoPE tables and bands are
fixed when the network is built, so `forward` does not depend on the data. The layout is described
in `convert.pytorch.layers`. Names and order of channels are those of the MLX network;
`convert.pytorch.weights` copies the weights.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert.pytorch import dc_ae
from convert.pytorch.attention import (
    Attend,
    CrossAttention,
    Grid,
    SelfAttention,
    SparseSelfAttention,
    attend_fused,
)
from convert.pytorch.folder import read_config, twin_files
from convert.pytorch.layers import (
    RMSNorm,
    linear,
    normalized,
    text_bias,
    tokens,
    velocity_to,
)
from convert.pytorch.parts import Decoder, LatentDecoder, TextEncoder
from mlx_snapgen.config import ModelConfig, TransformerConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded
from mlx_snapgen.reading import check_regular


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, dims, 1, 1), sinusoids of 1000 t through an MLP."""

    def __init__(self, frequency_dim: int, dims: int):
        super().__init__()
        self.frequencies = frequency_dim // 2
        self.linear1 = linear(frequency_dim, dims)
        self.linear2 = linear(dims, dims)

    def forward(self, t: Tensor) -> Tensor:
        # In float32 for weights of any type: angles go up to 1000.
        steps = torch.arange(self.frequencies, dtype=torch.float32, device=t.device)
        frequencies = 1000 * torch.exp(-math.log(10000) / self.frequencies * steps)
        angles = t.reshape(-1, 1, 1, 1).float() * frequencies.reshape(1, -1, 1, 1)
        x = torch.cat([angles.cos(), angles.sin()], 1).to(self.linear1.weight.dtype)
        return self.linear2(F.silu(self.linear1(x)))


class AdaLNSingle(nn.Module):
    """The timestep projection shared by all blocks: t -> (B, dims, 1, 1) and (B, 6 dims, 1, 1)."""

    def __init__(self, frequency_dim: int, dims: int):
        super().__init__()
        self.embedder = TimestepEmbedder(frequency_dim, dims)
        self.linear = linear(dims, 6 * dims)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.embedder(t)
        return embedding, self.linear(F.silu(embedding))


class FeedForward(nn.Module):
    def __init__(self, dims: int, ratio: float):
        super().__init__()
        self.linear1 = linear(dims, round(dims * ratio))
        self.linear2 = linear(round(dims * ratio), dims)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x), approximate="tanh"))


class Table(nn.Module):
    """Learned modulation, rows of (1, dims, 1, 1), on top of the timestep's."""

    def __init__(self, rows: int, dims: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, rows * dims, 1, 1))
        self.rows = rows

    def forward(self, modulation: Tensor) -> Sequence[Tensor]:
        return (self.weight + modulation).chunk(self.rows, 1)


class Block(nn.Module):
    """PixArt-alpha block at one stage's resolution."""

    def __init__(self, config: TransformerConfig, ffn_ratio: float, sparse: bool, attend: Attend):
        super().__init__()
        self.self_attention = (SparseSelfAttention if sparse else SelfAttention)(config, attend)
        self.cross_attention = CrossAttention(config, attend)
        self.ffn = FeedForward(config.hidden_size, ffn_ratio)
        self.modulation = Table(6, config.hidden_size)
        self.norm = partial(normalized, channels=config.hidden_size, eps=1e-6)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        bias: Tensor | None,
        present: Tensor | None,
        grid: Grid,
        cells: Grid | None = None,
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(modulation)
        h = self.norm(x) * (1 + scale_a) + shift_a
        x = x + gate_a * self.self_attention(h, grid, cells)
        x = x + self.cross_attention(x, text, bias, present)
        h = self.norm(x) * (1 + scale_f) + shift_f
        return x + gate_f * self.ffn(h)


class LongSkip(nn.Module):
    """Concatenate with an earlier output and project 2d -> d (U-ViT)."""

    def __init__(self, dims: int):
        super().__init__()
        self.linear = linear(2 * dims, dims)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.linear(torch.cat([x, skip], 1))


class Downsample(nn.Module):
    """2x2 cells of tokens -> one token."""

    def __init__(self, dims: int):
        super().__init__()
        self.linear = nn.Conv2d(dims, dims, 2, stride=2, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return tokens(self.linear(grid.picture(x)))


class Upsample(nn.Module):
    """One token -> a 2x2 cell, then a learned mix with the Down stage's output."""

    def __init__(self, dims: int):
        super().__init__()
        self.linear = linear(dims, 4 * dims, bias=False)
        self.skip_weight = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor, cells: Grid) -> Tensor:
        x = tokens(F.pixel_shuffle(cells.picture(self.linear(x)), 2))
        return skip + self.skip_weight * (x - skip)


class TextProjection(nn.Module):
    """States (B, dims, 1, L) of one encoder -> (B, text_width, 1, L)."""

    def __init__(self, dims: int, text_width: int):
        super().__init__()
        self.norm = RMSNorm(dims)
        self.linear = linear(dims, text_width)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear(self.norm(states))


class Head(nn.Module):
    """Modulated norm, a linear layer to what is predicted of a patch, and patches to pixels."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.modulation = Table(2, config.hidden_size)
        self.linear = linear(config.hidden_size, config.patch_size**2 * config.latent_channels)
        self.norm = partial(normalized, channels=config.hidden_size, eps=1e-6)
        self.patch = config.patch_size

    def forward(self, x: Tensor, embedding: Tensor, grid: Grid) -> Tensor:
        shift, scale = self.modulation(torch.cat([embedding, embedding], 1))
        v = self.linear(self.norm(x) * (1 + scale) + shift)
        return F.pixel_shuffle(grid.picture(v), self.patch)


class EfficientDiT(nn.Module):
    """Velocity v = eps - x0 of latents x_t = (1 - t) x0 + t eps, at one width and resolution.

    Args:
        config: of one width (`TransformerConfig.standalone`).
        latent_size: height and width of the latents; both divide by twice the patch size.
        attend: `attend_fused`, or `attend_split` for Core ML.
    """

    def __init__(
        self,
        config: TransformerConfig,
        latent_size: tuple[int, int],
        attend: Attend = attend_fused,
    ):
        super().__init__()
        if config.widths != (1.0,):
            raise UserError("the PyTorch network has one width: take config.standalone(width)")
        self.config = config
        d, sparse = config.hidden_size, config.sparse_attention
        down, middle, up = config.blocks
        self.patch_embed = nn.Conv2d(
            config.latent_channels, d, config.patch_size, stride=config.patch_size
        )
        self.time = AdaLNSingle(config.frequency_dim, d)
        self.text = nn.ModuleList(
            TextProjection(dims, config.text_width) for dims in config.text_dims
        )

        def blocks(count: int, stage: int, sparse: bool) -> nn.ModuleList:
            ratio = config.ffn_ratio[stage]
            return nn.ModuleList(Block(config, ratio, sparse, attend) for _ in range(count))

        self.down_blocks = blocks(down, 0, sparse)
        if middle:
            self.downsample = Downsample(d)
            self.middle_blocks = blocks(middle, 1, False)
            if config.long_skips:
                self.long_skips = nn.ModuleList(LongSkip(d) for _ in range(middle // 2))
            self.upsample = Upsample(d)
            self.up_blocks = blocks(up, 2, sparse)
        self.head = Head(config)
        self.resize(latent_size)

    def resize(self, latent_size: tuple[int, int]) -> None:
        """Change the (height, width) of the latents.

        Raises:
            UserError: sides that do not divide by twice the patch size.
        """
        unit = 2 * self.config.patch_size
        if any(side < 1 or side % unit for side in latent_size):
            height, width = latent_size
            raise UserError(
                f"latents of {height}x{width} do not divide by {unit}: choose another picture size"
            )
        height, width = (side // self.config.patch_size for side in latent_size)
        weight = self.patch_embed.weight
        self.grid = Grid(self.config, height, width, 1).to(weight)
        self.cells = Grid(self.config, height // 2, width // 2, 2).to(weight)

    def encode_text(self, states: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
        """Project each encoder's states and join them token-wise.

        Args:
            states: for each of `config.text_dims`, in order, states (B, L, D) and mask (B, L), true
                where a token counts; None for an encoder that is absent.

        Returns:
            text (B, text_width, 1, L) and mask (B, L), L the sum of the encoders' lengths.
        """
        if len(states) != len(self.text):
            raise UserError(f"{len(self.text)} text encoders expected, got {len(states)}")
        present = [(p, s) for p, s in zip(self.text, states, strict=True) if s is not None]
        if not present:
            raise UserError("all text encoders are absent: leave at least one")
        projected = [project(s.permute(0, 2, 1)[:, :, None]) for project, (s, _) in present]
        return torch.cat(projected, 3), torch.cat([mask for _, (_, mask) in present], 1)

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predict the velocity.

        Args:
            x_t: noisy latents (B, C, H, W).
            t: noise level (B,) in [0, 1], float32.
            text: (B, text_width, 1, L) from `encode_text`.
            mask: (B, L), 1 or true where a text token counts; None when all do. Where no token
                of a picture counts, cross-attention adds nothing.

        Returns:
            v (B, C, H, W)
        """
        values: dict[str, Any] = {"x_t": x_t, "t": t, "text": text, "mask": mask}
        for step in self.steps():
            values |= step(values)
        return values["velocity"]

    def steps(self) -> list["Step"]:
        """The order of the network's parts, from x_t, t, text and mask to "velocity".

        `forward` runs these steps, and `convert.pytorch.chunks` cuts between them. The hidden state
        is "x", or "skip" and "middle_<i>" where a later step reads it once more: in the middle
        stage, the output of block i returns at the input of block n - 1 - i.
        """
        grid, cells = self.grid, self.cells
        count, skips = self.config.blocks[1], self.config.long_skips
        steps: list[Step] = []

        def start(x_t: Tensor, t: Tensor, mask: Tensor | None) -> tuple[Tensor | None, ...]:
            x = tokens(self.patch_embed(x_t))
            if mask is None:
                return x, *self.time(t), None, None
            # The largest bias is 0 where a token counts.
            bias = text_bias(mask).to(x.dtype)
            return x, *self.time(t), bias, F.relu(1 + bias.amax(1, keepdim=True))

        def add(
            run: Callable, reads: tuple[str, ...], module: nn.Module, writes: str = "x"
        ) -> None:
            # The hidden state has the name that the step before gave it.
            reads = (steps[-1].writes[0], *reads)
            steps.append(Step(reads, (writes,), lambda *values: (run(*values),), (module,)))

        def add_block(block: nn.Module, *grids: Grid, writes: str = "x") -> None:
            def run(x: Tensor, *values: Tensor | None) -> Tensor:
                return block(x, *values, *grids)

            add(run, ("modulation", "text", "bias", "present"), block, writes)
            steps[-1] = steps[-1]._replace(is_block=True)

        made = ("x", "embedding", "modulation", "bias", "present")
        steps.append(Step(("x_t", "t", "mask"), made, start, (self.patch_embed, self.time)))
        for i, block in enumerate(self.down_blocks):
            last = count and i == len(self.down_blocks) - 1
            add_block(block, grid, cells, writes="skip" if last else "x")
        if count:
            add(lambda x: self.downsample(x, grid), (), self.downsample)
            for i, block in enumerate(self.middle_blocks):
                mirrored = count - 1 - i
                if skips and mirrored < i:
                    long_skip = self.long_skips[i - (count + 1) // 2]
                    add(long_skip, (f"middle_{mirrored}",), long_skip)
                add_block(block, cells, writes=f"middle_{i}" if skips and mirrored > i else "x")
            add(lambda x, skip: self.upsample(x, skip, cells), ("skip",), self.upsample)
            for block in self.up_blocks:
                add_block(block, grid, cells)
        head = self.head
        if self.config.prediction == "velocity":
            add(lambda x, embedding: head(x, embedding, grid), ("embedding",), head, "velocity")
        else:

            def finish(x: Tensor, embedding: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
                return velocity_to(head(x, embedding, grid), x_t, t)

            add(finish, ("embedding", "x_t", "t"), head, "velocity")
        return steps


class Step(NamedTuple):
    """A part of the network that is never cut. It reads and writes values by name."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[..., tuple[Any, ...]]
    modules: tuple[nn.Module, ...]
    is_block: bool = False
    """The network may be cut before it."""

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        made = self.run(*(values[name] for name in self.reads))
        return dict(zip(self.writes, made, strict=True))


class ProjectedEncoder(nn.Module):
    """A text encoder and its projection: tokens and mask (B, L) -> text (B, text_width, 1, L)."""

    def __init__(self, encoder: TextEncoder, projection: TextProjection):
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.projection(self.encoder(tokens, mask).permute(0, 2, 1)[:, :, None])


class Model(NamedTuple):
    """A model written by `convert.to_torch`, in memory."""

    config: ModelConfig
    transformer: EfficientDiT
    decoder: LatentDecoder | None
    """None if the model has a public autoencoder."""
    text_encoders: list[TextEncoder | None]
    """None for a public text encoder."""


def load(folder: str | Path, attend: Attend = attend_fused) -> Model:
    """Load a folder of `convert.to_torch`, in float32, on the CPU, for the model's own size.

    Args:
        attend: see `EfficientDiT`.

    Raises:
        UserError: no such folder, or weights that do not fit.
    """
    folder = expanded(folder)
    config, _ = read_config(folder)
    networks: dict[str, Any] = make_networks(config, attend)
    for name, network in networks.items():
        path = folder / f"{name}.safetensors"
        try:
            check_regular(path)
            network.load_state_dict(safetensors.torch.load_file(path))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} does not fit: {' '.join(str(error).split())}") from None
        network.eval().requires_grad_(False)
    encoders = [networks.get(f"text_encoder_{i}") for i in range(len(config.text_encoders))]
    return Model(config, networks["transformer"], networks.get("decoder"), encoders)


def make_networks(config: ModelConfig, attend: Attend = attend_fused) -> dict[str, nn.Module]:
    """The twins of a model's networks, by file name, with random weights."""
    side = config.autoencoder.downsampling
    height, width = config.image_size
    latent_size = (height // side, width // side)
    networks: dict[str, nn.Module] = {}
    for name in twin_files(config):
        if name == "transformer":
            networks[name] = EfficientDiT(config.transformer, latent_size, attend)
        elif name == "decoder":
            kind = dc_ae.Decoder if config.autoencoder.kind == "dc-ae" else Decoder
            networks[name] = kind(config.autoencoder)
        else:
            encoder = config.text_encoders[int(name.removeprefix("text_encoder_"))]
            networks[name] = TextEncoder(encoder, attend)
    return networks
