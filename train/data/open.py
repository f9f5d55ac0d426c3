"""Opens the data that a user names, for training and for `train.prepare`.

A SOURCE is a folder that `train.prepare` wrote, a folder of pictures, .tar files, .parquet files
(each also as a pattern such as "set/*.tar"), or the rendered stickers: `stickers`, or with settings
`stickers:nouns=100,categories=colors+size`, and `stickers:pictures=FOLDER` for Fluent Emoji's.
"""

import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.files import expanded
from mlx_snapgen.picture_files import Size
from mlx_snapgen.reading import read_object
from train.data.imagefolder import bucket_sizes
from train.data.mixture import Mixture
from train.data.pictures import RecordPictures
from train.data.readers.folder import PictureFolderRecords
from train.data.readers.joined import JoinedRecords
from train.data.readers.tars import TarRecords
from train.data.selection import HELD_OUT, CaptionWeights, Filter
from train.data.shards import INDEX, SETTINGS, SHARDS
from train.data.source import RecordSource, Source

STICKERS = "stickers"
SETTINGS_OF_STICKERS = ("nouns", "categories", "pictures")
TARS = (".tar", ".tar.gz", ".tgz")
PARQUET = (".parquet",)
PICTURES = (
    "a folder of pictures, .tar or .parquet files (also a pattern in quotes, such as "
    f'"set/*.tar"), or {STICKERS}'
)
SOURCES = f"a folder that train.prepare wrote, {PICTURES}"


def open_data(
    specs: Sequence[str],
    *,
    size: Size,
    unit: int,
    seed: int,
    weights: Sequence[float] | None = None,
    captions: CaptionWeights | None = None,
    template: str | None = None,
    filter: Filter | None = None,
    share: float = HELD_OUT,
    folder: Path | None = None,
    resolution: int | None = None,
    pictures_only: bool = False,
) -> Source:
    """The data of a training run.

    Args:
        specs: the user's SOURCEs, see above.
        size: (height, width) to train at; other shapes have about as many pixels.
        unit: sides of pictures are multiples of this.
        seed: of the order of samples and the choice of captions.
        weights: share of the batches of each source; None: in proportion to their pictures, or
            equal ones if one of them has no end.
        captions: columns of captions, with weights; None: the first.
        template: see `PictureFolderRecords`.
        filter: the records to use; prepared folders are filtered already.
        share: of the pictures, kept for validation; prepared folders have theirs.
        folder: where the index of pictures is kept for the next start, or None.
        resolution: that prepared folders must have, in pixels; None for any.
        pictures_only: also use pictures without a caption, which is "".

    Returns:
        a `LatentSource` if all sources are folders of `train.prepare`, or else a `PictureSource`.

    Raises:
        UserError: a source that cannot be opened, or both kinds.
    """
    groups = [[spec] for spec in specs] if weights is not None else _together(specs)
    if weights is not None and len(weights) != len(specs):
        raise UserError(f"--weights: {len(weights)} for {len(specs)} of --data; give one for each")
    check_one_kind([group[0] for group in groups])
    sources: list[Source] = []
    for group in groups:
        if is_prepared(group[0]):
            source = _open_prepared(group[0], resolution=resolution, captions=captions, seed=seed)
        elif is_stickers(group[0]):
            source = _open_stickers(group[0], seed=seed)
        else:
            source = RecordPictures(
                open_records(
                    group,
                    template=template,
                    columns=list(captions or ()),
                    pictures_only=pictures_only,
                ),
                bucket_sizes(size, unit),
                filter=replace(filter or Filter(), pictures_only=pictures_only),
                captions=captions,
                seed=seed,
                share=share,
                folder=folder,
            )
        sources.append(source)
    if len(sources) == 1:
        return sources[0]
    counts = [count for source in sources if (count := source.num_samples) is not None]
    shares = counts if len(counts) == len(sources) else [1] * len(sources)
    return Mixture(sources, weights or shares, seed=seed)


def is_prepared(spec: str) -> bool:
    """Whether a SOURCE is a folder that `train.prepare` wrote."""
    folder = expanded(spec)
    if (folder / SETTINGS).is_file() and (folder / SHARDS).is_dir():
        return True
    try:
        return (folder / INDEX).is_file() and "format_version" in read_object(
            folder / INDEX, most=2**30, paths=True
        )
    except UserError:
        return False


def is_stickers(spec: str) -> bool:
    """Whether a SOURCE is the rendered stickers."""
    return spec.split(":")[0] == STICKERS and not Path(spec).exists()


def is_there(spec: str) -> bool:
    """Whether a SOURCE can be opened from the current folder."""
    return is_stickers(spec) or expanded(spec).is_dir() or bool(_found(spec))


def open_records(
    specs: Sequence[str],
    *,
    template: str | None = None,
    columns: Sequence[str] = (),
    pictures_only: bool = False,
) -> RecordSource:
    """The records of folders of pictures, .tar files or .parquet files, one after the other.

    Args:
        specs: the user's SOURCEs, see above.
        template: see `PictureFolderRecords`.
        columns: of captions that must be there; none for all.
        pictures_only: also give pictures without a caption.

    Raises:
        UserError: no such file, or another kind of file.
    """
    groups = _together(specs)
    options: dict[str, Any] = {"template": template, "columns": columns}
    sources = [_open_group(group, **options, pictures_only=pictures_only) for group in groups]
    return sources[0] if len(sources) == 1 else JoinedRecords(sources)


def _open_group(
    specs: Sequence[str], *, template: str | None, columns: Sequence[str], pictures_only: bool
) -> RecordSource:
    if expanded(specs[0]).is_dir():
        return PictureFolderRecords(Path(specs[0]), template=template, pictures_only=pictures_only)
    paths = [path for spec in specs for path in _files(spec)]
    kinds = {_kind(path.name): path for path in paths}
    if None in kinds:
        raise UserError(f"{kinds[None]} is no file of pictures: give {SOURCES}")
    if len(kinds) > 1:
        raise UserError(f"{specs[0]}: give .tar and .parquet files as two SOURCEs")
    if TARS in kinds:
        return TarRecords(paths, pictures_only=pictures_only)
    try:
        from train.data.readers.parquet import ParquetRecords
    except ImportError:
        raise UserError(f"{paths[0]}: install pyarrow to read it: pip install pyarrow") from None
    return ParquetRecords(paths, columns=columns, pictures_only=pictures_only)


def _kind(name: str) -> tuple[str, ...] | None:
    return next((ends for ends in (TARS, PARQUET) if name.lower().endswith(ends)), None)


def _files(spec: str) -> list[Path]:
    """The files of a SOURCE in the order of their names; `UserError` if there are none."""
    check_there(spec)
    return _found(spec)


def _found(spec: str) -> list[Path]:
    """The files of a pattern, sorted; a folder that exists is no pattern, also with brackets."""
    path = expanded(spec)
    if path.is_file():
        return [path]
    folder = next((each for each in path.parents if os.path.isdir(each)), Path())
    pattern = Path(glob.escape(str(folder)), path.relative_to(folder))
    return sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))


def check_there(spec: str) -> None:
    """`UserError` unless a SOURCE can be opened from the current folder."""
    if not is_there(spec):
        hint = nearest(spec, [STICKERS])
        raise UserError(f"no such file or folder: {spec}{hint}; give {SOURCES}")


def check_one_kind(specs: Sequence[str]) -> None:
    """`UserError` if some of the SOURCEs are folders of `train.prepare`, and others are not."""
    prepared = [is_prepared(spec) for spec in specs]
    if any(prepared) and not all(prepared):
        other = specs[prepared.index(False)]
        raise UserError(
            f"--data: {specs[prepared.index(True)]} holds encoded pictures, {other} does not: "
            f"encode {other} with python -m train.prepare, or train on it alone"
        )


def _together(specs: Sequence[str]) -> list[list[str]]:
    """The SOURCEs, neighboring ones that are files of one format together as one."""
    groups: list[list[str]] = []
    kinds: list[tuple[str, ...] | None] = []
    for spec in specs:
        kind = _kind(spec)
        if kind and kinds and kind == kinds[-1] and not expanded(spec).is_dir():
            groups[-1].append(spec)
        else:
            groups.append([spec])
            kinds.append(kind)
    return groups


def _open_prepared(
    spec: str, *, resolution: int | None, captions: CaptionWeights | None, seed: int
) -> Source:
    from train.data.prepared import Prepared

    source = Prepared(expanded(spec), captions=captions, seed=seed)
    if resolution not in (None, source.resolution):
        raise UserError(
            f"{spec} was prepared at {source.resolution} pixels, not at --resolution {resolution}: "
            "leave the option out, or prepare the pictures again"
        )
    return source


def _open_stickers(spec: str, *, seed: int) -> Source:
    from train.data.stickers.render import find_pictures
    from train.data.stickers.source import Stickers
    from train.data.stickers.vocabulary import collection_in

    given: dict[str, str] = {}
    for setting in filter(None, spec.partition(":")[2].split(",")):
        name, _, value = setting.partition("=")
        if name not in SETTINGS_OF_STICKERS:
            hint = nearest(name, SETTINGS_OF_STICKERS)
            known = ", ".join(SETTINGS_OF_STICKERS)
            raise UserError(f"--data {spec}: no setting {name}{hint}; there are {known}")
        given[name] = value
    nouns = given.get("nouns")
    if nouns is not None and not nouns.isdecimal():
        raise UserError(f"--data {spec}: nouns={nouns} is not a whole number")
    pictures = find_pictures(given["pictures"]) if "pictures" in given else None
    categories = tuple(given["categories"].split("+")) if "categories" in given else None
    known = collection_in(pictures).categories
    for name in categories or ():
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"--data {spec}: no category {name}{hint}: {', '.join(known)}")
    return Stickers(seed, None if nouns is None else int(nouns), categories, pictures)
