"""The default model's other networks in PyTorch: the decoder and the text encoder.

Twins of `networks.autoencoders.convolutional.Decoder` and of
`networks.text_encoders.sentencepiece.TransformerTextEncoder`, in the layout of
`convert.pytorch.layers`.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert.pytorch.attention import Attend, attend_fused
from convert.pytorch.layers import LayerNorm, RMSNorm, keys_of, linear, text_bias
from mlx_snapgen.config import AutoencoderConfig, TextEncoderConfig
from mlx_snapgen.semantics import (
    CHANNELS,
    CODE_CHANNELS,
    COLOR,
    COLUMN,
    GROUND,
    ROW,
    SIDE,
    THING,
    SemanticConfig,
    Which,
    codes,
    some_codes,
)


class ResidualBlock(nn.Module):
    """Channel RMS norm, then two 3x3 convolutions around a leaky ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.leaky_relu(self.conv1(self.norm(x)), 0.1))


class LatentDecoder(nn.Module):
    """Base class of decoders, with the statistics of the latents."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        mean = config.latents_mean or (0.0,) * config.latent_channels
        std = config.latents_std or (1.0,) * config.latent_channels
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1), persistent=False)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalized latents -> the network's input."""
        return latents * self.std + self.mean


def nearest(semantics: Tensor, part: slice, which: Which = None) -> tuple[Tensor, Tensor]:
    """The nearest codes in the channels `part` of semantics (B, S, h, w), out of `which`.

    Returns:
        Indices into these codes, int (B, h, w), and whether the code is there, bool (B, 1, h, w).
    """
    channels = part.stop - part.start
    known = torch.from_numpy(some_codes(channels, which).copy()).to(semantics)
    found = F.conv2d(semantics[:, part], known[:, :, None, None])
    best, index = found.max(1, keepdim=True)
    return index[:, 0], best > channels / 2


def looked_up(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (N, C) of a table at index (B, h, w) -> (B, C, h, w)."""
    return F.embedding(index, rows).permute(0, 3, 1, 2)


def known_codes(semantics: Tensor, part: slice, which: Which = None) -> Tensor:
    """The nearest codes in the channels `part` of semantics (B, S, h, w), or 0."""
    index, is_there = nearest(semantics, part, which)
    known = torch.from_numpy(some_codes(part.stop - part.start, which).copy()).to(semantics)
    return looked_up(known, index) * is_there.to(semantics)


def mended(semantics: Tensor, config: SemanticConfig) -> Tensor:
    """`networks.autoencoders.semantics.mended`: (B, S, h, w), where a thing's places agree."""
    height, width = semantics.shape[2:]
    is_thing = nearest(semantics, THING, config.known)[1].flatten(1)
    parts = (SIDE, len(config.sides)), (COLUMN, None), (ROW, None)
    square = [nearest(semantics, part, count)[0].flatten(1) for part, count in parts]
    side = torch.tensor(config.sides)[square[0]]
    # Of pairs of a place (second axis) and the square that another one names (third axis).
    is_in, same = is_thing[:, None], is_thing[..., None]
    columns = torch.arange(width).repeat(height)
    rows = torch.arange(height).repeat_interleave(width)
    for here, edge in ((columns, square[1]), (rows, square[2])):
        inside = here[:, None] - edge[:, None]
        is_in = is_in & (inside >= 0) & (inside < side[:, None])
    for number in square:
        same = same & (number[..., None] == number[:, None])
    is_in, area = is_in.to(semantics), (side**2).to(semantics)
    share = (same.to(semantics) * is_in).sum(1) / area
    most, chosen = (is_in * share[:, None]).max(-1)

    means = semantics[:, : COLOR.stop].flatten(2) @ is_in / area[:, None]
    means = means[..., None]
    parts = (means, THING, config.known), (means, COLOR, None)
    places = semantics.flatten(2)[..., None]
    found = [
        *(known_codes(*part) for part in parts),
        torch.zeros_like(places[:, GROUND]),
        *(known_codes(places, part) for part in (COLUMN, ROW)),
        known_codes(places, SIDE, len(config.sides)),
    ]
    found = torch.cat(found, 1)[..., 0]
    found = found.gather(2, chosen[:, None].expand(-1, CHANNELS, -1))
    found = (found * (most > 0.5)[:, None].to(semantics)).unflatten(2, (height, width))
    ground = known_codes(semantics, GROUND)
    return torch.cat([found[:, : GROUND.start], ground, found[:, GROUND.stop :]], 1)


class ThingTable(nn.Module):
    """How known things look: semantic latents (B, S, h, w) -> latents of appearance."""

    def __init__(self, config: SemanticConfig):
        super().__init__()
        self.known, self.sides = config.known, config.sides
        self.starts = list(itertools.accumulate((s**2 for s in config.sides), initial=0))
        self.things = nn.Embedding(len(config.known) * config.places, config.appearance_channels)
        self.empty = nn.Parameter(torch.zeros(config.appearance_channels))

    def forward(self, semantics: Tensor) -> Tensor:
        thing, is_there = nearest(semantics, THING, self.known)
        kind, _ = nearest(semantics, SIDE, len(self.sides))
        side = torch.tensor(self.sides)[kind]
        height, width = semantics.shape[2:]
        column = torch.arange(width)[None, None] - nearest(semantics, COLUMN)[0]
        row = torch.arange(height)[None, :, None] - nearest(semantics, ROW)[0]
        # Whole numbers all the way: Core ML's clamp makes them float16, which ends at 65,504.
        column, row = (torch.where(x < 0, 0, x) for x in (column, row))
        column, row = (torch.where(x < side, x, side - 1) for x in (column, row))
        first = thing * self.starts[-1] + torch.tensor(self.starts)[kind]
        known = looked_up(self.things.weight, first + row * side + column)
        return torch.where(is_there, known, self.empty.reshape(1, -1, 1, 1))


class Paint(nn.Module):
    """Paints known things and lays them over a background: pictures (B, 4, H, W)."""

    def __init__(self, config: SemanticConfig, factor: int):
        super().__init__()
        width, colors = config.paint_width, len(codes(CODE_CHANNELS))
        self.known, self.factor = config.known, factor
        self.pixel = linear(4, width)
        self.thing = nn.Embedding(len(config.known), width)
        self.color, self.color_again = nn.Embedding(colors, width), nn.Embedding(colors, width)
        self.layers = nn.ModuleList(linear(width, width) for _ in range(2))
        self.out = linear(width, 4)
        self.grounds = nn.Parameter(torch.zeros(colors, 4))

    def forward(self, pictures: Tensor, semantics: Tensor) -> Tensor:
        def enlarged(x: Tensor) -> Tensor:
            return F.interpolate(x, scale_factor=self.factor, mode="nearest")

        thing, is_thing = nearest(semantics, THING, self.known)
        color, is_painted = nearest(semantics, COLOR)
        both = looked_up(self.thing.weight, thing) + looked_up(self.color.weight, color)
        x = self.layers[0](F.leaky_relu(self.pixel(pictures) + enlarged(both), 0.1))
        x = F.leaky_relu(x + enlarged(looked_up(self.color_again.weight, color)), 0.1)
        x = x + F.leaky_relu(self.layers[1](x), 0.1)
        painted = enlarged((is_thing & is_painted).to(x))
        pictures = pictures + painted * self.out(x)

        ground, is_ground = nearest(semantics, GROUND)
        pictures = torch.where(enlarged((is_ground & ~is_thing).to(x)) > 0.5, -1.0, pictures)
        below = (looked_up(self.grounds, ground) + 1) * is_ground.to(x)
        pictures = pictures + F.relu(-1 - pictures) * enlarged(is_ground.to(x))
        visible = 1 - ((pictures[:, 3:] + 1) / 2).clamp(0, 1)
        return pictures + visible * enlarged(below)


class Decoder(LatentDecoder):
    """Normalized latents (B, C, h, w) -> pictures (B, 3, f h, f w), about [-1, 1], not clipped."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        channels, self.levels = config.decoder_channels, len(config.decoder_channels)
        self.inp = nn.Conv2d(config.appearance_channels, channels[0], 3, padding=1)
        if config.semantics:
            self.table, self.paint = (
                ThingTable(config.semantics),
                Paint(config.semantics, config.downsampling),
            )
            self.missing = config.appearance_channels + CHANNELS - config.latent_channels
        for i, (width, count) in enumerate(zip(channels, config.decoder_blocks, strict=True), 1):
            blocks = nn.ModuleList(ResidualBlock(width) for _ in range(count))
            self.add_module(f"blocks{i}", blocks)
            if i < self.levels:
                self.add_module(f"up{i}", linear(width, 4 * channels[i]))
        self.out = nn.Conv2d(channels[-1], 4 * config.picture_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        latents = self.denormalize(latents)
        if not self.config.semantics:
            return self.draw(latents)
        appearance, semantics = latents[:, :-CHANNELS], latents[:, -CHANNELS:]
        semantics = mended(semantics, self.config.semantics)
        appearance = torch.where(nearest(semantics, GROUND)[1], 0.0, appearance)
        known = self.table(semantics)
        appearance = F.pad(appearance, (0, 0, 0, 0, 0, self.missing))
        return self.paint(self.draw(known + appearance), semantics)

    def draw(self, latents: Tensor) -> Tensor:
        """Pictures of latents of appearance."""
        x = self.inp(latents)
        for i in range(1, self.levels + 1):
            for block in self.get_submodule(f"blocks{i}").children():
                x = block(x)
            if i < self.levels:
                x = F.pixel_shuffle(self.get_submodule(f"up{i}")(x), 2)
        return F.pixel_shuffle(self.out(x), 2)


class Layer(nn.Module):
    """Pre-norm transformer layer, bidirectional."""

    def __init__(self, config: TextEncoderConfig, attend: Attend):
        super().__init__()
        d = config.hidden_size
        self.norm1, self.norm2 = LayerNorm(d), LayerNorm(d)
        self.qkv_proj, self.out_proj = linear(d, 3 * d), linear(d, d)
        self.linear1, self.linear2 = linear(d, 4 * d), linear(4 * d, d)
        self.heads, self.attend = range(config.num_heads), attend
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(self.norm1(x)).chunk(3, 1)
        k = keys_of(k, len(self.heads))
        x = x + self.out_proj(self.attend(q, k, v, kv_of=self.heads, bias=bias))
        return x + self.linear2(self.activation(self.linear1(self.norm2(x))))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu_tanh": _gelu_tanh, "gelu": F.gelu, "quick_gelu": _quick_gelu}
"""`TextEncoderConfig.activation` -> the function."""


class TextEncoder(nn.Module):
    """Tokens and mask (B, L), 1 or true where one counts -> states (B, L, D)."""

    def __init__(self, config: TextEncoderConfig, attend: Attend = attend_fused):
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, d)
        self.position_embedding = nn.Parameter(torch.zeros(config.max_length, d))
        self.layers = nn.ModuleList(Layer(config, attend) for _ in range(config.num_layers))
        self.norm = LayerNorm(d)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]
        x = x.permute(0, 2, 1)[:, :, None]
        bias = text_bias(mask).to(x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)[:, :, 0].permute(0, 2, 1)
