"""What a model knows, to hold it to it: prompts and its own pictures of them."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.draw import draw_pictures
from mlx_snapgen.errors import UserError
from train.data.encoded import encode_captions, encode_pictures
from train.data.source import Batch
from train.data.stickers.scenes import training_scene
from train.data.stickers.vocabulary import known_nouns

PRIOR_SEED = 1_000_000  # of the first prior picture, away from seeds that people type


def draw_prior(components: Components, captions: Sequence[str]) -> Batch:
    """What the model knows: `latents` of its pictures of `captions`, with the encoded captions."""
    with tqdm(total=len(captions), desc="what the model knows", unit="picture") as bar:
        seeds = range(PRIOR_SEED, PRIOR_SEED + len(captions))
        pictures = draw_pictures(components, captions, seeds=seeds, progress=bar.update)
    latents = encode_pictures(components.autoencoder, list(pictures))
    return {"latents": latents} | encode_captions(components.text_encoders, captions)


def prior_captions(components: Components, path: Path | None, count: int) -> list[str]:
    """Prompts that the model knows: those of a file, or scenes of the model's vocabulary.

    Returns:
        at most `count`; none for a model whose vocabulary is not this project's.
    """
    if path is not None:
        try:
            lines = path.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        captions = [line.strip() for line in lines if line.strip()]
        if not captions:
            raise UserError(f"{path} is empty: one prompt in each line is expected")
        return captions[:count]
    try:
        num_nouns = known_nouns(components)
    except UserError:
        return []
    return [training_scene(0, k, num_nouns).caption for k in range(count)]
