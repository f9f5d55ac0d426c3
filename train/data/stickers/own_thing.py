"""A new thing of a user in the stickers' scenes, from cut-outs of it.

Nothing is drawn to train on: a scene has the thing's codes, and the decoder looks up how it looks.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import Adam
from PIL import Image

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.errors import UserError, one_line
from mlx_snapgen.lora.things import Thing
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.text_encoders.base import normalize
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.prompt_check import words_of_captions
from mlx_snapgen.semantics import SEEN_CHANNELS, SemanticConfig
from mlx_snapgen.vocabulary import ALL_NUMBERS, ARTICLES, nouns, pluralize
from train.data.imagefolder import Example, read_picture
from train.data.readers.folder import PictureFolderRecords
from train.data.source import CodedSource, Skipped, describe_skipped
from train.data.stickers.captions import Scene, caption, pick
from train.data.stickers.semantics import semantic_map
from train.data.stickers.source import Stickers
from train.data.stickers.vocabulary import Noun, collection_of
from train.data.streams import Stream

MOST_LOOKS = 8
"""Pictures of a thing that are used."""
MOST_LETTERS = 40
"""Of a thing's name."""
NO_START = {*ARTICLES, *ALL_NUMBERS} - {"single"}
NO_END = {*ARTICLES, *ALL_NUMBERS, "and", "at", "in", "of", "on", "to", "with", "without"}
"""Words that no name of a thing starts or ends with."""
OPAQUE, CLEAR_SHARE = 16, 0.1
"""Least alpha of what is to be seen, and least share of a cut-out's border that is less opaque."""


def is_cutout(picture: np.ndarray) -> bool:
    """Whether a thing in a picture (H, W, 4), uint8, has transparent surroundings."""
    alpha = picture[..., 3]
    border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    return bool((border < OPAQUE).mean() >= CLEAR_SHARE and (alpha >= OPAQUE).any())


def read_cutouts(folder: Path) -> tuple[list[tuple[Path, Image.Image]], list[str]]:
    """The pictures of a folder, RGBA, cropped to what is drawn, and a line for each one skipped.

    Raises:
        UserError: no such folder, no picture in it, or one without transparent surroundings.
    """
    found: dict[Path, Image.Image] = {}
    skipped = []
    for record in PictureFolderRecords(folder, pictures_only=True).records():
        if isinstance(record, Skipped):
            skipped.append(describe_skipped(record))
            continue
        path = folder / record.place[0]
        if path in found:
            continue  # in the metadata twice
        try:
            picture = read_picture(path, has_alpha=True)
        except UserError as error:
            skipped.append(str(error))
            continue
        if not is_cutout(np.asarray(picture)):
            raise UserError(
                f"{path} has no transparent surroundings: cut the thing out, or train without "
                "--thing, on pictures with captions"
            )
        found[path] = cropped(picture)
    if not found:
        why = f" ({skipped[0]})" if skipped else ""
        raise UserError(f"no usable picture in {folder}{why}: give cut-outs of one thing (RGBA)")
    return sorted(found.items(), key=lambda one: one[0]), skipped


def cropped(picture: Image.Image) -> Image.Image:
    """An RGBA picture without its transparent surroundings."""
    alpha = picture.getchannel("A")
    return picture.crop(alpha.point([255 * (a >= OPAQUE) for a in range(256)]).getbbox())


def in_square(cutout: Image.Image, side: int) -> np.ndarray:
    """A cut-out in the middle of a square of `side` pixels: uint8 RGBA, colors times alpha."""
    from train.data.stickers.render import scaled  # which also reads the font: only if needed

    drawn = scaled(cutout.convert("RGBa"), side, Image.Resampling.HAMMING)
    height, width = drawn.rgb.shape[:2]
    y, x = (side - height) // 2, (side - width) // 2
    square = np.zeros((side, side, 4), np.uint8)
    square[y : y + height, x : x + width, :3] = drawn.rgb
    square[y : y + height, x : x + width, 3:] = 255 - (255 * drawn.keep >> 8)
    return square


def table_rows(autoencoder: Autoencoder, cutout: Image.Image) -> mx.array:
    """The rows of a decoder's table for a cut-out: its latents in each size, (places, A)."""
    config, factor = autoencoder.config.semantics, autoencoder.config.downsampling
    assert config is not None
    largest = config.sides[-1]
    rows = []
    for side in config.sides:
        first = (largest - side) // 2
        start, end = first * factor, (first + side) * factor
        picture = np.zeros((1, largest * factor, largest * factor, 4), np.uint8)
        picture[0, start:end, start:end] = in_square(cutout, side * factor)
        latents = autoencoder.encoder(from_uint8(picture))[0][..., :-SEEN_CHANNELS]
        rows.append(latents[0, first : first + side, first : first + side].flatten(0, 1))
    return mx.concatenate(rows)


def fitted(autoencoder: Autoencoder, cutout: Image.Image, rows: mx.array) -> mx.array:
    """Rows (places, A) as of `table_rows` after a few steps to what the decoder draws best.

    Those of known things were trained with the decoder, too.
    """
    config, factor = autoencoder.config.semantics, autoencoder.config.downsampling
    assert config is not None
    ends = np.cumsum([side**2 for side in config.sides])[:-1].tolist()
    found = []
    for side, part in zip(config.sides, mx.split(rows, ends), strict=True):
        true = from_uint8(in_square(cutout, side * factor)[None])
        part = part.reshape(1, side, side, -1)
        found.append(_fitted(autoencoder.decoder, true, part).reshape(side**2, -1))
    return mx.concatenate(found)


FIT_STEPS, FIT_RATE, MARGIN = 12, 0.02, 2
"""Steps of Adam, its learning rate, and latents around a thing. Twice the steps gain 0.3 dB more of
1.5 dB."""


def _fitted(decoder: Any, true: mx.array, rows: mx.array) -> mx.array:
    """Latents of appearance (1, h, w, A) that draw a picture (1, H, W, 4), starting at `rows`."""
    empty, edge = decoder.table.empty, MARGIN * (true.shape[1] // rows.shape[1])

    @mx.compile
    @mx.value_and_grad
    def error(rows: mx.array) -> mx.array:
        around = mx.pad(rows - empty, [(0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)])
        drawn = decoder.draw(around + empty)[:, edge:-edge, edge:-edge]
        return (drawn - true).square().mean()

    optimizer, parameters = Adam(FIT_RATE), {"rows": rows}
    for _ in range(FIT_STEPS):
        _, gradient = error(parameters["rows"])
        parameters = optimizer.apply_gradients({"rows": gradient}, parameters)
        mx.eval(parameters, optimizer.state)
    return parameters["rows"]


def spare_codes(semantics: SemanticConfig, name: str, count: int, *, seed: int) -> tuple[int, ...]:
    """Numbers of codes for the looks of a thing, at most `count` of those that are free.

    They depend on the name, so that LoRAs of two things can be used together.
    """
    free = [code for code in semantics.free() if code not in semantics.own]
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    rng = np.random.default_rng((seed, int.from_bytes(digest, "big")))
    return tuple(rng.permutation(free)[:count].tolist())


def check_names(components: Components, name: str, plural: str | None) -> tuple[str, str]:
    """Both names in the letters of captions; `UserError` for one that means something already."""
    name = " ".join(normalize(name).split())
    plural = " ".join(normalize(plural).split()) if plural else pluralize(name)
    vocabulary = components.vocabulary or {}
    known, taken = nouns(vocabulary), words_of_captions(vocabulary)
    for option, word in (("--thing", name), ("--plural", plural)):
        parts = word.split()
        plain = "".join(parts).replace("-", "").replace("'", "")
        if not (plain.isalpha() and len(word) <= MOST_LETTERS):
            raise UserError(
                f"{option} takes a noun of at most {MOST_LETTERS} letters: '{one_line(word, 60)}'"
            )
        if word in known or taken.issuperset(parts):
            raise UserError(f"{option} {word}: the model knows this word, choose a new one")
        if wrong := [*{parts[0]} & NO_START, *{parts[-1]} & NO_END]:
            raise UserError(f"{option} '{word}' is no noun: leave out '{wrong[0]}'")
    return name, plural


def known_scenes_of(components: Components, *, seed: int) -> Stickers:
    """Scenes of the things that a model knows, to train on without drawing them.

    Raises:
        UserError: the model is none of Fluent Emoji with semantic latents, or has no codes left.
    """
    semantics, collection = components.config.autoencoder.semantics, collection_of(components)
    names = (components.vocabulary or {}).get("nouns", [])
    count = 0 if semantics is None else semantics.things
    if not count or names[:count] != [noun.name for noun in collection.nouns[:count]]:
        raise UserError("--thing takes a model of Fluent Emoji with semantic latents")
    if not num_free(semantics):
        raise UserError("all codes of this model are taken: train without --thing")
    # The folder tells the collection; nothing is drawn.
    return Stickers(seed, num_nouns=count, pictures=Path())


def num_free(semantics: SemanticConfig | None) -> int:
    """Number of codes that more things can have."""
    return 0 if semantics is None else len({*semantics.free()} - {*semantics.own})


@dataclasses.dataclass(frozen=True)
class OwnThing(CodedSource):
    """Scenes in which one kind of things is a user's, in its own colors.

    Attributes:
        known: the scenes before.
        thing: one of its looks, by chance, is in a scene.
    """

    known: Stickers
    thing: Thing

    @property
    def looks(self) -> dict[Noun, int]:
        """One noun for each look, and the number of its code, which is in place of an emoji."""
        name, more = self.thing.name, self.thing.plural
        return {Noun(name, more, str(c), None, (), ()): c for c in self.thing.codes}

    def scenes(self, number: int, count: int) -> list[Scene]:
        """The scenes of a batch."""
        rng = Stream.OWN_THING.generator(self.known.seed, number)
        looks = list(self.looks)
        return [with_own_thing(s, looks, rng) for s in self.known.scenes(number, count)]

    @property
    def num_things(self) -> int:
        """See `CodedSource`: of those with the first codes."""
        return self.known.num_things

    def semantics(self, number: int, count: int, *, factor: int) -> np.ndarray:
        """See `CodedSource`."""
        scenes = self.scenes(number, count)
        return np.stack([semantic_map(scene, factor, more=self.looks) for scene in scenes])

    def prompts(self, number: int, count: int) -> list[str]:
        """See `PromptSource`."""
        return [scene.caption for scene in self.scenes(number, count)]

    def settings(self) -> dict[str, Any]:
        """See `Source`."""
        return self.known.settings() | {"thing": self.thing.name}


def with_own_thing(scene: Scene, looks: Sequence[Noun], rng: np.random.Generator) -> Scene:
    """The scene with one kind of its things replaced by one of `looks`, and a new caption."""
    kinds = list(dict.fromkeys(placed.noun for placed in scene.placed))
    old, new = pick(rng, kinds), pick(rng, looks)
    placed = tuple(
        dataclasses.replace(one, noun=new, color=None) if one.noun == old else one
        for one in scene.placed
    )
    scene = dataclasses.replace(scene, placed=placed)
    return dataclasses.replace(scene, caption=caption(scene, rng))


def examples_of(cutouts: Sequence[tuple[Path, Image.Image]], *, side: int) -> list[Example]:
    """The pictures as they are in the largest size, to compare those of two runs."""
    return [Example(path, "", in_square(cutout, side)) for path, cutout in cutouts]
