"""What `train.kdmd` trains on."""

import argparse
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from mlx_snapgen.cli.prompts_file import read_prompts
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.picture_files import Size
from mlx_snapgen.settings import check_size
from train.data.prepared import prepared_parts
from train.data.prompts import PromptList
from train.data.simulation import PromptBatches, prepared_prompts, sized_prompts
from train.data.source import PromptSource, Source
from train.data.streams import Stream
from train.options.data import check_data
from train.setup.data import open_source


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What to train on.

    Attributes:
        source: prompts, for previews.
        size: of previews.
        data: that of `--data`, or None.
        settings: see `Source`.
        newer: settings that runs of earlier versions did not record.
    """

    batches: PromptBatches
    source: PromptSource
    size: Size
    data: Source | None
    settings: dict[str, Any]
    newer: dict[str, Any] = dataclasses.field(default_factory=dict)


def open_prompts(args: argparse.Namespace, config: ModelConfig) -> Prompts:
    """The prompts of the options, with the sizes of their pictures.

    Raises:
        UserError: a size or value that is not valid, or data that cannot be opened.
    """
    for height, width in args.sizes or ():
        if height % config.size_unit or width % config.size_unit:
            raise UserError(
                f"--sizes {height}x{width}: give multiples of {config.size_unit} pixels"
            )
        check_size(config, height, width)
    check_data(args, unit=config.size_unit)
    side = args.resolution
    size = (side, side) if side else config.image_size
    if args.prompts_file:
        prompts = list(read_prompts(args.prompts_file))
        source = PromptList(prompts, args.seed)
        digest = hashlib.blake2b("\n".join(prompts).encode(), digest_size=8).hexdigest()
        sizes = args.sizes or [size]
        batches = sized_prompts(source, sizes, seed=args.seed)
        newer = {"prompts_digest": digest}
        return Prompts(batches, source, sizes[0], None, {"data": "prompts"}, newer)
    data = open_source(args, config)
    shares = {} if args.sizes else data.size_shares
    sizes = args.sizes or list(shares) or [size]
    if prepared_parts(data):
        batches = prepared_prompts(data, sizes=args.sizes or (), seed=args.seed)
    else:
        weights = list(shares.values()) or None
        batches = sized_prompts(data, sizes, seed=args.seed, weights=weights)
    return Prompts(batches, data, sizes[0], data, data.settings())


def share_of(args: argparse.Namespace, shares: Sequence[float]) -> Callable[[int], float]:
    """Step -> the share of the network's width that it trains.

    It is the same for all iterations of a student step, so that the critic of this width is up to
    date.
    """

    def share(step: int) -> float:
        turn = step // args.student_every
        return float(Stream.CRITIC_WIDTHS.generator(args.seed, turn).choice(shares))

    return share
