"""Prior samples: a model's own pictures, for prior preservation."""

from collections.abc import Sequence

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.cli.notices import picture_bar
from mlx_snapgen.draw import draw_pictures
from train.data.encoded import encode_captions, encode_pictures
from train.data.source import Batch

PRIOR_SEED = 1_000_000  # seed of the first prior picture, larger than seeds that users choose


def draw_prior(components: Components, captions: Sequence[str]) -> Batch:
    """`latents` of the model's own pictures of `captions`, with the encoded captions."""
    with picture_bar(len(captions), "prior pictures", leave=True) as progress:
        seeds = range(PRIOR_SEED, PRIOR_SEED + len(captions))
        pictures = draw_pictures(components, captions, seeds=seeds, progress=progress)
    latents = encode_pictures(components.autoencoder, list(pictures))
    return {"latents": latents} | encode_captions(components.text_encoders, captions)
