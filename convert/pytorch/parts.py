"""The default model's other networks in PyTorch: the decoder and the text encoder.

Twins of `networks.autoencoders.convolutional.Decoder` and of
`networks.text_encoders.sentencepiece.TransformerTextEncoder`, in the layout of
`convert.pytorch.layers`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert.pytorch.attention import Attend, attend_fused
from convert.pytorch.layers import LayerNorm, RMSNorm, keys_of, linear, text_bias
from mlx_snapgen.config import PLACE, AutoencoderConfig, TextEncoderConfig


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


class SemanticTable(nn.Module):
    """Semantic latents (B, S, h, w) -> features (B, C, h, w) of what they mean at a place."""

    def __init__(self, channels: int, config: AutoencoderConfig):
        super().__init__()
        keys, rank = config.semantic_keys, config.semantic_rank
        self.key = linear(config.semantic_channels - (PLACE.stop - PLACE.start), keys)
        self.things = linear(keys, rank)
        self.waves = linear(2, rank // 4, bias=False)
        self.places = linear(rank // 2, rank)
        self.out = linear(rank, channels)

    def forward(self, semantics: Tensor) -> Tensor:
        codes = torch.cat([semantics[:, : PLACE.start], semantics[:, PLACE.stop :]], dim=1)
        waves = self.waves(semantics[:, PLACE])
        places = self.places(torch.cat([torch.sin(waves), torch.cos(waves)], dim=1))
        return self.out(self.things(torch.sigmoid(self.key(codes))) * places)


class Decoder(LatentDecoder):
    """Normalized latents (B, C, h, w) -> pictures (B, 3, f h, f w), about [-1, 1], not clipped."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        channels, self.levels = config.decoder_channels, len(config.decoder_channels)
        self.inp = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        if config.semantic_rank:
            self.table = SemanticTable(channels[0], config)
        for i, (width, count) in enumerate(zip(channels, config.decoder_blocks, strict=True), 1):
            blocks = nn.ModuleList(ResidualBlock(width) for _ in range(count))
            self.add_module(f"blocks{i}", blocks)
            if i < self.levels:
                self.add_module(f"up{i}", linear(width, 4 * channels[i]))
        self.out = nn.Conv2d(channels[-1], 4 * config.picture_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        latents = self.denormalize(latents)
        x = self.inp(latents)
        if self.config.semantic_rank:
            x = x + self.table(latents[:, -self.config.semantic_channels :])
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
