"""What config.json may contain, as frozen dataclasses. Does not import mlx.

Defaults are those of the paper's network.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlx_snapgen.description import Abilities, choose_mode
from mlx_snapgen.errors import UserError, check_faults, nearest
from mlx_snapgen.semantics import CHANNELS, SemanticConfig

PREDICTIONS = ("velocity", "x0")


@dataclass(frozen=True)
class TransformerConfig:
    """The Efficient DiT (SnapGen++ section 3). Sizes are those of the widest network.

    A single-resolution network (ladder A) has all its blocks in the first stage: `(28, 0, 0)`.
    """

    hidden_size: int = 2048
    head_dim: int = 64
    num_kv_heads: int = 8
    """Key/value heads of self-attention at full width; sliced together with the query heads."""
    num_cross_kv_heads: int = 4
    """Key/value heads of cross-attention, the same at every width."""
    blocks: tuple[int, int, int] = (8, 10, 10)
    """Blocks in the Down, Middle and Up stages."""
    ffn_ratio: tuple[float, float, float] = (4.0, 3.0, 4.0)
    sparse_attention: bool = True
    """ASSA in the Down and Up stages; dense self-attention when false."""
    num_bands: int = 16
    """Blocks of blockwise neighborhood attention, as bands of token rows."""
    band_radius: int = 1
    long_skips: bool = True
    """Dense long skip connections inside the Middle stage."""
    patch_size: int = 2
    latent_channels: int = 16
    text_dims: tuple[int, ...] = (2560, 512)
    """State width of each text encoder, in order."""
    text_width: int = 2560
    """Width that every encoder's states are projected to before they are concatenated."""
    frequency_dim: int = 256
    rope_theta: float = 10000.0
    widths: tuple[float, ...] = (1.0, 0.5, 0.375)
    """Widths this network can run at, the widest first."""
    prediction: str = "velocity"
    """What the last layer gives: the "velocity", or the clean latents "x0", from which it is
    computed (`networks.base.velocity_to`). A width with fewer channels than a patch has numbers
    learns only "x0": a velocity contains all the noise of the patch."""

    def __post_init__(self):
        check_faults([*self._faults(), *self._faults_of_heads()])

    def _faults(self) -> Iterator[str]:
        falling = list(self.widths) == sorted(self.widths, reverse=True)
        if self.widths[:1] != (1.0,) or not falling or self.widths[-1] <= 0:
            yield f"widths must start with 1.0 and fall, above 0, got {self.widths}"
        if self.prediction not in PREDICTIONS:
            yield f"unknown prediction '{self.prediction}'{nearest(self.prediction, PREDICTIONS)}"
        if self.frequency_dim % 2:
            yield f"frequency_dim must be even, got {self.frequency_dim}"
        if len(self.blocks) != 3 or len(self.ffn_ratio) != 3:
            yield "blocks and ffn_ratio take three numbers: Down, Middle, Up"
        elif bool(self.blocks[1]) != bool(self.blocks[2]) or not self.blocks[0]:
            yield f"blocks must be (n, 0, 0) or three positive numbers: {self.blocks}"
        if not all(1 / self.hidden_size <= ratio <= 100 for ratio in self.ffn_ratio):
            yield f"ffn_ratio takes numbers up to 100, not {self.ffn_ratio}"

    def _faults_of_heads(self) -> Iterator[str]:
        # What follows is about the sizes that are proposed, so that all faults are known at once.
        size, dim = self.hidden_size, self.head_dim
        if dim % 4:
            dim = max(4, round(dim / 4) * 4)
            yield f"head_dim must divide by 4 for 2-D RoPE, got {self.head_dim}: {dim} does"
        num_heads = max(1, round(size / dim))
        if size % dim:
            yield f"hidden_size, {size}, must divide by head_dim, {dim}: {num_heads * dim} does"
        if num_heads % self.num_kv_heads:
            yield (
                f"{num_heads} heads (hidden_size / head_dim) do not divide by num_kv_heads, "
                f"{self.num_kv_heads}"
            )
        for width in self.widths:
            heads, kv_heads = num_heads * width, self.num_kv_heads * width
            if heads % 1 or (self.num_kv_heads > 1 and kv_heads % 1):
                yield (
                    f"width {width:g}: {heads:g} heads and {kv_heads:g} of num_kv_heads must be "
                    "whole, or omit it"
                )
            elif heads % self.num_cross_kv_heads and heads > self.num_cross_kv_heads:
                yield (
                    f"width {width:g}: {heads:g} heads do not divide by num_cross_kv_heads, "
                    f"{self.num_cross_kv_heads}"
                )

    @property
    def num_heads(self) -> int:
        """Query heads at full width."""
        return self.hidden_size // self.head_dim

    def standalone(self, share: float) -> "TransformerConfig":
        """Config of the sub-network of `share` as a stand-alone network."""
        self.width_index(share)
        return dataclasses.replace(
            self,
            hidden_size=round(self.hidden_size * share),
            num_kv_heads=max(1, round(self.num_kv_heads * share)),
            widths=(1.0,),
        )

    def width_index(self, share: float) -> int:
        """Index of `share` in `widths`; `UserError` if the network does not have this width."""
        if share not in self.widths:
            held = ", ".join(f"{w:g}" for w in self.widths)
            raise UserError(f"this network holds the widths {held}, not {share:g}")
        return self.widths.index(share)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Convolutional autoencoder.

    Channels and blocks are listed in the order of computation. The kind "convolutional", the
    default model's, has an encoder with channels at 1/4 and 1/8 of the picture's side, and a
    decoder with channels at 1/8, 1/4 and 1/2; each further level doubles the factor. The kinds
    "qwen-image", "taehv", "kl" and "flux2" have channels at 1, 1/2, 1/4 and 1/8, and in reverse
    order in the decoder; "dc-ae" has them at 1, 1/2 and so on to 1/32. The latents of the kind
    "pixels" are the pixels; it has no weights.
    """

    kind: str = "convolutional"
    latent_channels: int = 8
    encoder_channels: tuple[int, ...] = (64, 128)
    decoder_channels: tuple[int, ...] = (128, 64, 32)
    encoder_blocks: tuple[int, ...] = (1, 2)
    decoder_blocks: tuple[int, ...] = (2, 2, 1)
    latents_mean: tuple[float, ...] = ()
    """Per channel; subtracted from the encoder's latents. Empty means 0. Kind "flux2": per channel
    and place in a patch of 2x2 latents, in the order of `pack`."""
    latents_std: tuple[float, ...] = ()
    picture_channels: int = 3
    """3 for RGB; 4, with alpha, for the kind "convolutional" only."""
    semantics: SemanticConfig | None = None
    """The last latents tell what is where, and the others how it looks where that is not enough
    (kind "convolutional" only)."""

    @property
    def appearance_channels(self) -> int:
        """Latents of the encoder and for the decoder's first level, without semantic ones."""
        return self.semantics.appearance_channels if self.semantics else self.latent_channels

    @property
    def downsampling(self) -> int:
        """Side of a picture in pixels, divided by the side of its latents."""
        if self.kind in ("dc-ae", "pixels"):
            return 32 if self.kind == "dc-ae" else 1
        return 2 ** (len(self.encoder_channels) + 1) if self.kind == "convolutional" else 8

    def __post_init__(self):
        if self.kind == "convolutional":
            self._check_levels()
        elif self.kind == "pixels" and self.latent_channels != 3:
            raise UserError(f"pixels have 3 channels, not {self.latent_channels}")
        elif self.kind in ("kl", "flux2"):
            sizes = (*self.encoder_channels, *self.decoder_channels)
            if any(size % 32 for size in sizes):
                raise UserError(f"channels of the kind {self.kind} divide by 32, not {sizes}")
        if self.semantics is not None:
            if self.kind != "convolutional":
                raise UserError(f"latents of the kind {self.kind} are not semantic")
            if self.picture_channels != 4:
                raise UserError("semantic latents need pictures with alpha: picture_channels 4")
            most = CHANNELS + self.semantics.appearance_channels
            if not CHANNELS < self.latent_channels <= most:
                raise UserError(
                    f"with semantics there are {CHANNELS + 1} to {most} latent_channels, not "
                    f"{self.latent_channels}"
                )
        each = "channel of a 2x2 patch" if self.kind == "flux2" else "channel"
        count = self.latent_channels * (4 if self.kind == "flux2" else 1)
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) not in (0, count):
                raise UserError(f"{name} needs {count} numbers, one per {each}")
        if not all(std > 0 for std in self.latents_std):
            raise UserError(f"latents_std must be above 0, not {min(self.latents_std):g}")

    def _check_levels(self) -> None:
        for part in ("encoder", "decoder"):
            channels, blocks = getattr(self, f"{part}_channels"), getattr(self, f"{part}_blocks")
            if not channels or len(channels) != len(blocks):
                raise UserError(
                    f"{part}_channels {channels} and {part}_blocks {blocks} need one number each "
                    "for every level"
                )
        if len(self.decoder_channels) != len(self.encoder_channels) + 1:
            raise UserError(
                f"the decoder has {len(self.decoder_channels)} levels; it needs one more than the "
                f"encoder, which has {len(self.encoder_channels)}"
            )


@dataclass(frozen=True)
class TextEncoderConfig:
    """A text encoder, by kind.

    "transformer", the default model's, is bidirectional over sentencepiece tokens and trained with
    the model. "clip" is CLIP's causal text tower, "gemma" a Gemma 3.
    """

    kind: str = "transformer"
    vocab_size: int = 2048
    hidden_size: int = 256
    num_layers: int = 2
    num_heads: int = 4
    max_length: int = 24
    activation: str = "gelu_tanh"
    """"gelu_tanh", "gelu" (exact) or "quick_gelu" (OpenAI's CLIP)."""
    source: str | None = None
    """Folder (absolute, or relative to the model folder) or Hugging Face repository with the
    weights in their original format; None means text_encoder_<n>.safetensors in the model
    folder."""
    revision: str | None = None
    """Branch, tag or commit of a repository."""


@dataclass(frozen=True)
class PictureEncoderConfig:
    """CLIP's picture tower, a ViT."""

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    patch_size: int = 32
    image_size: int = 224
    """Side of the square pictures in pixels."""
    activation: str = "quick_gelu"
    """"gelu" (exact) or "quick_gelu" (OpenAI's CLIP)."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Of the colors of the training pictures in [0, 1]."""


@dataclass(frozen=True)
class ClipConfig:
    """A whole CLIP: two towers and the space that they share."""

    text: TextEncoderConfig
    picture: PictureEncoderConfig
    projection_size: int
    """Numbers of an embedding."""


LEAST_SHIFT = 1e-3
"""Of noise levels; far smaller ones leave no noise at all."""


@dataclass(frozen=True)
class SamplerConfig:
    """A model's own sampler settings."""

    num_inference_steps: int = 28
    guidance_scale: float = 4.0
    time_shift: float | None = 3.0
    """Shift of the noise levels (`sampling.get_schedule`); None: by resolution
    (`ModelConfig.time_shift`)."""
    fresh_noise: bool = False
    """Add new noise to each step's estimate instead of taking Euler steps (`sampling.denoise`)."""

    def __post_init__(self):
        if self.time_shift is not None and not self.time_shift >= LEAST_SHIFT:
            raise UserError(f"time_shift must be at least {LEAST_SHIFT:g}, not {self.time_shift:g}")


def resolution_shift(tokens: int) -> float:
    """The time shift of a picture of `tokens` patch tokens: 1 at 256 px, 3 at 1024 px.

    Constant outside, and linear in the square root of the tokens between, which is the factor by
    which noise must grow to hide as much of a larger picture (SD3 section 5.3.2).
    """
    return 1 + 2 / 3 * (min(max(math.sqrt(tokens / 256), 1), 4) - 1)


UNCONDITIONAL = ("empty prompt", "absent")


@dataclass(frozen=True)
class ModelConfig:
    """A whole text-to-image model: one `config.json`."""

    name: str = ""
    image_size: tuple[int, int] = (1024, 1024)
    """Default (height, width) in pixels."""
    trained_sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) in pixels of all pictures that it was trained on; other sizes are drawn at
    the nearest (see `settings.trained_size`). Empty: not known, any size is drawn."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_encoders: tuple[TextEncoderConfig, ...] = ()
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    few_step: SamplerConfig | None = None
    """The sampler of the model's few-step LoRA; None if it has none."""
    quantization: dict[str, Any] | None = None
    """How the stored weights are quantized: per component `{"bits": 8, "group_size": 32}`."""
    unconditional: str = "empty prompt"
    """The text of the unconditional velocity, in training and for an empty negative prompt: the
    encoded "empty prompt", or "absent": all text is masked, cross-attention is zero."""

    def __post_init__(self):
        if self.unconditional not in UNCONDITIONAL:
            raise UserError(
                f"unknown unconditional '{self.unconditional}'"
                f"{nearest(str(self.unconditional), UNCONDITIONAL)}, known: "
                + ", ".join(f"'{name}'" for name in UNCONDITIONAL)
            )
        check_latents(self.transformer.latent_channels, self.autoencoder)

    @property
    def size_unit(self) -> int:
        """Height and width of a picture, in pixels, must be multiples of this."""
        # A token covers patch_size latents per side, and 2x2 tokens are compressed to one.
        return self.autoencoder.downsampling * self.transformer.patch_size * 2

    @property
    def unconditional_prompt(self) -> str | None:
        """The prompt of the unconditional velocity: "", or None for absent text."""
        return "" if self.unconditional == "empty prompt" else None

    @property
    def widths(self) -> tuple[float, ...]:
        """See `Description.widths`."""
        return self.transformer.widths

    def abilities(self, *, few_step: bool = False) -> Abilities:
        """See `Description.abilities`; both modes can do the same."""
        return Abilities(alpha=self.autoencoder.picture_channels == 4)

    def time_shift(
        self, height: int, width: int, *, few_step: bool = False, num_inference_steps: int = 0
    ) -> float:
        """The shift of the noise levels of a picture of height x width pixels.

        Args:
            few_step: that of the few-step mode, if the model has one.
            num_inference_steps: has no effect here, but in other models.
        """
        sampler = self.few_step if few_step and self.few_step else self.sampler
        if sampler.time_shift is not None:
            return sampler.time_shift
        token = self.autoencoder.downsampling * self.transformer.patch_size
        return resolution_shift(height // token * (width // token))

    def of_one_size(self) -> "ModelConfig":
        """This config with the numbers that `image_size` determines, for an export of that size."""
        few_step = self.few_step and dataclasses.replace(
            self.few_step, time_shift=self.time_shift(*self.image_size, few_step=True)
        )
        sampler = dataclasses.replace(self.sampler, time_shift=self.time_shift(*self.image_size))
        return dataclasses.replace(self, trained_sizes=(), sampler=sampler, few_step=few_step)

    def sampler_for(
        self, num_inference_steps: int | None = None, few_step: bool | None = None
    ) -> SamplerConfig:
        """`few_step` or `sampler`, depending on the arguments: see `choose_mode`."""
        return choose_mode(
            self.sampler, self.few_step, num_inference_steps=num_inference_steps, few_step=few_step
        )


def check_latents(latent_channels: int, autoencoder: AutoencoderConfig) -> None:
    """`UserError` unless the autoencoder has the latent channels that the transformer takes."""
    if latent_channels != autoencoder.latent_channels:
        raise UserError(
            f"the transformer takes {latent_channels} latent channels, the autoencoder gives "
            f"{autoencoder.latent_channels}"
        )
