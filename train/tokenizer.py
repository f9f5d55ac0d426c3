"""Train the default model's tokenizer on captions: `python -m train.tokenizer --output FILE`."""

import argparse
import io
import itertools
from pathlib import Path

import sentencepiece

from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import whole_file
from mlx_snapgen.networks.text_encoders.base import normalize
from train.data.stickers.scenes import scenes
from train.data.stickers.vocabulary import BACKGROUNDS, COLOURS, NOUNS


def train_tokenizer(vocab_size: int, num_captions: int = 60_000) -> bytes:
    """A serialized BPE model over captions of all nouns, so that more can be learned later.

    Every word of the vocabulary is added many times: the pieces then are whole words for what the
    pictures can show and syllables for what a person may type besides.
    """
    captions = (s.caption for s in itertools.islice(scenes(0), num_captions))
    names = [w for n in NOUNS for w in (n.name, n.plural, *n.synonyms)]
    names += [*COLOURS, *BACKGROUNDS]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain(map(normalize, captions), names * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,!?'-&:",
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
    )
    return model.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.tokenizer", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=2048)
    args = parser.parse_args()
    if args.output.exists():
        raise UserError(f"{args.output} exists: choose another name or delete it first")
    with whole_file(args.output) as partial:
        partial.write_bytes(train_tokenizer(args.vocab_size))


if __name__ == "__main__":
    run_command(main)
