"""What a teacher is made of, as frozen dataclasses. No mlx here."""

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
    """Share of each head that turns with the frame, the row and the column."""
    rope_theta: float = 10000.0

    def __post_init__(self):
        check_axes(self.rope_axes, self.head_dim)

    @property
    def hidden_size(self) -> int:
        """Width of both streams."""
        return self.num_heads * self.head_dim


def check_axes(rope_axes: tuple[int, ...], head_dim: int) -> None:
    """`UserError` unless the axes are three, of pairs, and fill a head."""
    if len(rope_axes) != 3 or sum(rope_axes) != head_dim or any(n % 2 for n in rope_axes):
        raise UserError(
            f"rope_axes {tuple(rope_axes)} must be three even numbers that sum to {head_dim}"
        )
