"""A whole CLIP (arXiv 2103.00020): embeds pictures and texts in one space.

The measures of train/evaluation compare these embeddings; a model that draws has the text tower
alone (text_encoders/clip.py).
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mlx_snapgen.alpha import over
from mlx_snapgen.config import ClipConfig, PictureEncoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.text_encoders.base import Tokenizer
from mlx_snapgen.networks.text_encoders.clip import ClipTextEncoder
from mlx_snapgen.networks.text_encoders.sentencepiece import Layer


def center_square(picture: np.ndarray, size: int) -> np.ndarray:
    """The center of a uint8 picture (H, W, C) at `size` x `size` pixels, as CLIP sees it.

    A fourth channel is alpha (the colors are times alpha); such a picture is over white.

    The shorter side is resized to `size` by antialiased bicubic interpolation, the longer one by
    the same factor, rounded down. Then the center is cropped, at offsets rounded to even at .5:
    the transform of OpenAI's CLIP (`Resize` and `CenterCrop` of torchvision).
    """
    height, width = picture.shape[:2]
    short = min(height, width)
    new_height, new_width = (size * side // short for side in (height, width))
    picture = over(picture, 255)
    image = Image.fromarray(picture).resize((new_width, new_height), Image.Resampling.BICUBIC)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return np.asarray(image)[top : top + size, left : left + size]


class ClipPictureEncoder(nn.Module):
    """CLIP's Vision Transformer: a class token before the patches, norms around the layers."""

    def __init__(self, config: PictureEncoderConfig):
        super().__init__()
        self.config = config
        side, rest = divmod(config.image_size, config.patch_size)
        if rest:
            raise UserError(
                f"pictures of {config.image_size} pixels do not divide into patches of "
                f"{config.patch_size}"
            )
        dims = config.hidden_size
        self.patch_embedding = nn.Conv2d(
            3, dims, config.patch_size, stride=config.patch_size, bias=False
        )
        self.class_embedding = mx.random.normal((dims,)) * dims**-0.5
        self.position_embedding = mx.random.normal((side**2 + 1, dims)) * dims**-0.5
        self.pre_norm = nn.LayerNorm(dims)
        self.layers = [
            Layer(dims, config.num_heads, config.activation, mlp_size=config.mlp_size)
            for _ in range(config.num_layers)
        ]
        self.post_norm = nn.LayerNorm(dims)

    def preprocess(self, pictures: Sequence[np.ndarray]) -> mx.array:
        """uint8 pictures (H, W, 3) of any sizes -> normalized (B, S, S, 3), S `image_size`."""
        squares = np.stack([center_square(p, self.config.image_size) for p in pictures])
        mean, std = mx.array(self.config.mean), mx.array(self.config.std)
        return (mx.array(squares).astype(mx.float32) / 255 - mean) / std

    def __call__(self, x: mx.array) -> mx.array:
        """Pictures (B, S, S, 3) from `preprocess` -> state of the class token (B, D)."""
        x = self.patch_embedding(x).flatten(1, 2)  # (B, patches, D)
        first = mx.broadcast_to(self.class_embedding, (len(x), 1, x.shape[-1]))
        x = self.pre_norm(mx.concatenate([first, x], axis=1) + self.position_embedding)
        for layer in self.layers:
            x = layer(x, None)
        return self.post_norm(x[:, 0])


class Clip(nn.Module):
    """Both towers, and their projections into the space that they share."""

    def __init__(self, config: ClipConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.text_encoder = ClipTextEncoder(config.text, tokenizer)
        self.picture_encoder = ClipPictureEncoder(config.picture)
        size = config.projection_size
        self.text_projection = nn.Linear(config.text.hidden_size, size, bias=False)
        self.picture_projection = nn.Linear(config.picture.hidden_size, size, bias=False)
        self.logit_scale = mx.array(np.log(1 / 0.07), mx.float32)

    def embed_texts(self, texts: Sequence[str]) -> mx.array:
        """Texts -> embeddings (B, E) of norm 1; a long text is cut to the tokenizer's length."""
        tokens, mask = self.text_encoder.tokenize(texts)
        # The state of the end mark: the last token that counts.
        last = mask.sum(axis=1) - 1
        states = self.text_encoder(tokens, mask)[mx.arange(len(tokens)), last]
        return _normalized(self.text_projection(states))

    def embed_pictures(self, pictures: Sequence[np.ndarray]) -> mx.array:
        """uint8 pictures (H, W, 3) of any sizes -> embeddings (B, E) of norm 1."""
        states = self.picture_encoder(self.picture_encoder.preprocess(pictures))
        return _normalized(self.picture_projection(states))


def _normalized(x: mx.array) -> mx.array:
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)
