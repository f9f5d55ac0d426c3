"""Configs of the transformers of public models. Does not import mlx."""

from dataclasses import dataclass

from mlx_snapgen.errors import UserError


@dataclass(frozen=True)
class QwenTransformerConfig:
    """Qwen-Image's transformer; the defaults are the public 20B network."""

    num_layers: int = 60
    num_heads: int = 24
    head_dim: int = 128
    latent_channels: int = 16
    patch_size: int = 2
    text_dims: int = 3584
    """Width of the text encoder's states."""
    frequency_dim: int = 256
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    """Channels of each head that RoPE rotates by frame, row and column."""
    rope_theta: float = 10000.0

    def __post_init__(self):
        check_axes(self.rope_axes, self.head_dim)

    @property
    def hidden_size(self) -> int:
        """Width of both streams."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class ZImageTransformerConfig:
    """Z-Image's transformer; the defaults are the public 6B network."""

    num_layers: int = 30
    num_refiner_layers: int = 2
    hidden_size: int = 3840
    num_heads: int = 30
    latent_channels: int = 16
    patch_size: int = 2
    text_dims: int = 2560
    frequency_dim: int = 256
    time_hidden: int = 1024
    time_dims: int = 256
    """Width of the timestep embedding."""
    norm_eps: float = 1e-5
    rope_axes: tuple[int, int, int] = (32, 48, 48)
    rope_theta: float = 256.0

    def __post_init__(self):
        check_axes(self.rope_axes, self.hidden_size // self.num_heads)


@dataclass(frozen=True)
class Flux2TransformerConfig:
    """FLUX.2's transformer; the defaults are the public 4B network of klein."""

    num_layers: int = 5
    """Blocks with separate streams for picture and text."""
    num_single_layers: int = 20
    """Blocks with one stream."""
    num_heads: int = 24
    head_dim: int = 128
    latent_channels: int = 32
    patch_size: int = 2
    text_dims: int = 7680
    """Width of the prompt's states: three layers of the text encoder."""
    mlp_ratio: float = 3.0
    frequency_dim: int = 256
    rope_axes: tuple[int, int, int, int] = (32, 32, 32, 32)
    """Channels of each head that RoPE rotates by picture, row, column and word."""
    rope_theta: float = 2000.0

    def __post_init__(self):
        check_axes(self.rope_axes, self.head_dim, count=4)
        if not 1 / self.hidden_size <= self.mlp_ratio <= 100:
            raise UserError(f"mlp_ratio takes numbers up to 100, not {self.mlp_ratio}")

    @property
    def hidden_size(self) -> int:
        """Width of both streams."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class MiniT2ITransformerConfig:
    """MiniT2I's transformer; the defaults are the public network B/16."""

    num_layers: int = 17
    """Blocks with separate streams for picture and text."""
    num_text_layers: int = 2
    """Blocks of the text alone, before the others."""
    num_heads: int = 12
    head_dim: int = 64
    latent_channels: int = 3
    patch_size: int = 16
    patch_dims: int = 128
    """Width of a patch's first projection."""
    mlp_size: int = 2048
    text_dims: int = 1024
    """Width of the text encoder's states."""
    text_tokens: int = 256
    """All prompts are padded to this."""
    image_size: int = 512
    """Side in pixels of the square pictures that it was trained on."""

    def __post_init__(self):
        if self.head_dim % 4:
            raise UserError(f"head_dim must divide by 4 for 2-D RoPE, got {self.head_dim}")
        if self.image_size % self.patch_size:
            raise UserError(
                f"pictures of {self.image_size} pixels do not divide by patches of "
                f"{self.patch_size}"
            )

    @property
    def hidden_size(self) -> int:
        """Width of both streams."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class T5Config:
    """The encoder of a T5 1.1 or a FLAN-T5; the defaults are FLAN-T5-large."""

    vocab_size: int = 32128
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    head_dim: int = 64
    mlp_size: int = 2816
    num_buckets: int = 32
    """Distances between tokens that the attention distinguishes, in both directions."""
    max_distance: int = 128
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.num_buckets < 4 or self.num_buckets % 2 or self.max_distance <= self.num_buckets:
            raise UserError(
                f"{self.num_buckets} buckets do not cover distances up to {self.max_distance}"
            )
        if not self.num_layers:
            raise UserError("a T5 has at least one layer")


def check_axes(rope_axes: tuple[int, ...], head_dim: int, *, count: int = 3) -> None:
    """`UserError` unless there are `count` even axes that add up to `head_dim`."""
    if len(rope_axes) != count or sum(rope_axes) != head_dim or any(n % 2 for n in rope_axes):
        number = {3: "three", 4: "four"}[count]
        raise UserError(
            f"rope_axes {tuple(rope_axes)} must be {number} even numbers that sum to {head_dim}"
        )
