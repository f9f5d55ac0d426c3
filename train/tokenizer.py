"""Train the built-in model's tokenizer on captions: `python -m train.tokenizer --output FILE`."""

import io
import itertools

import sentencepiece
from tqdm import tqdm

from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import whole_file
from mlx_snapgen.networks.text_encoders.base import normalize
from train.data.stickers.scenes import training_scene
from train.data.stickers.vocabulary import BACKGROUNDS, COLORS, NOUNS
from train.options.common import add_number, add_output, check_at_least, check_new


def train_tokenizer(vocab_size: int, num_captions: int = 60_000) -> bytes:
    """A serialized BPE model over captions of all nouns, so that a model can learn more of them
    later.

    Every word of the vocabulary is added many times. So the tokens are whole words of the
    vocabulary, and syllables of all other words. `UserError` for too few or too many pieces.
    """
    numbers = tqdm(range(num_captions), desc="captions", leave=False)
    captions = (training_scene(0, k).caption for k in numbers)
    names = [w for n in NOUNS for w in (n.name, n.plural, *n.synonyms)]
    names += [*COLORS, *BACKGROUNDS]
    model = io.BytesIO()
    try:
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
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"no vocabulary of {vocab_size} pieces: {reason}") from None
    return model.getvalue()


def main() -> None:
    parser = Parser(prog="python -m train.tokenizer", description=__doc__)
    add_output(parser, ".model file to write")
    add_number(parser, "--vocab-size", 2048, "number of pieces in the vocabulary")
    args = parser.parse_args()
    check_at_least(args, 1, "vocab_size")
    check_new(args.output)
    with whole_file(args.output) as partial:
        partial.write_bytes(train_tokenizer(args.vocab_size))
    print(f"{args.output}: {args.vocab_size} pieces")


if __name__ == "__main__":
    run_command(main)
