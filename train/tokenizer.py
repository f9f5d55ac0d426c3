"""Train a tokenizer on captions: `python -m train.tokenizer --data SOURCE... --output FILE`.

The result is for a text encoder that is trained with the model (`train.new --tokenizer FILE`).
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
from tqdm import tqdm

from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import whole_file
from mlx_snapgen.networks.text_encoders.base import normalize
from train.data.source import Source
from train.data.stickers.source import Stickers
from train.options.common import add_number, add_output, check_at_least, check_new_file
from train.options.data import add_data, check_data
from train.setup.data import data_from

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-&:"
"""These are in every vocabulary, so that no English prompt has an unknown character."""
NUM_MARKS = 4
"""Pieces that are no text: for unknown characters, begin, end and padding."""


def read_captions(source: Source, most: int) -> Iterator[str]:
    """At most `most` captions of a source, each picture's at most once."""
    count = min(most, source.num_samples or most)
    for number in tqdm(range(count), desc="captions", leave=False):
        yield source.prompts(number, 1)[0]


def train_tokenizer(
    captions: Iterable[str], vocab_size: int, *, words: Sequence[str] = ()
) -> tuple[bytes, int]:
    """A serialized BPE model, and the number of its pieces.

    That is `vocab_size`, or less if the captions do not have so many different ones.

    Args:
        captions: what to train on.
        words: those that are to be one piece if possible: each is added many times.

    Raises:
        UserError: too few pieces for the characters of the captions.
    """
    lines = [normalize(caption) for caption in captions] + list(words) * 20
    try:
        # Fewer than the marks would be another error, which is not about the captions.
        return _train(lines, max(vocab_size, NUM_MARKS)), vocab_size
    except RuntimeError as error:
        possible = re.search(r"too high.*<= (\d+)", str(error))
        if possible is None:
            reason = re.sub(r"^\w+: src/\S+ ", "", " ".join(str(error).split()))
            if fewest := re.search(r"required_chars\. \d+ vs (\d+)", reason):
                reason = f"the captions need at least {fewest.group(1)}"
            raise UserError(f"no vocabulary of {vocab_size} pieces: {reason}") from None
        most = int(possible.group(1))
        return _train(lines, most), most


def _train(lines: Sequence[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        required_chars=CHARACTERS,
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
    )
    return model.getvalue()


def main() -> None:
    parser = Parser(prog="python -m train.tokenizer", description=__doc__)
    add_output(parser, ".model file to write")
    add_data(parser, resolution="256; captions do not depend on it")
    add_number(parser, "--vocab-size", 2048, "number of pieces in the vocabulary")
    add_number(parser, "--num-captions", 60_000, "captions to train on, at most")
    args = parser.parse_args()
    check_at_least(args, 1, "vocab_size", "num_captions")
    check_new_file(args.output)
    check_data(args, unit=1)
    with announce("reading the data ..."):
        source = data_from(args, size=(256, 256), unit=32, seed=0)
    words = [w for part in source.sources if isinstance(part, Stickers) for w in part.words()]
    model, size = train_tokenizer(
        read_captions(source, args.num_captions), args.vocab_size, words=words
    )
    with whole_file(args.output) as partial:
        partial.write_bytes(model)
    print(f"{args.output}: {size} pieces")


if __name__ == "__main__":
    run_command(main)
