"""The text towers of CLIP and TinyCLIP: byte-pair tokenizer and network.

The paper conditions on TinyCLIP (SnapGen++ section 2; arXiv 2309.12314). The states are those after
the last layer norm, of every token; the projection to the space shared with pictures is dropped.
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.text_encoders.base import padded
from mlx_snapgen.networks.text_encoders.sentencepiece import TransformerTextEncoder
from mlx_snapgen.reading import read_bytes

END_OF_WORD = "</w>"

# English suffixes such as 's, runs of letters, single digits, runs of anything else.
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")


def byte_symbols() -> list[str]:
    """The printable character that represents each byte in the merges, in order of token ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


_SYMBOLS = byte_symbols()
_BYTE_OF = {
    symbol: byte
    for symbol, byte in zip(
        _SYMBOLS, sorted(range(256), key=lambda b: (chr(b) not in _SYMBOLS, b)), strict=True
    )
}
_SYMBOL_OF = {byte: symbol for symbol, byte in _BYTE_OF.items()}


class ClipTokenizer:
    """Byte-level BPE of lower-cased words between begin and end marks, padded to a fixed length.

    The vocabulary follows from the merges: the 256 bytes, the same at the end of a word, a token
    for each merge, begin and end.

    Args:
        model: the merges in UTF-8, "first second" on each line, as in CLIP's merges.txt.
        max_length: tokens per prompt, marks included.
    """

    def __init__(self, model: bytes, max_length: int):
        self.model, self.max_length = model, max_length
        lines = [line for line in model.decode().splitlines() if line and line[:9] != "#version:"]
        merges = [tuple(line.split(" ")) for line in lines]
        if any(len(pair) != 2 for pair in merges):
            raise ValueError("a merge is two symbols with a space between")
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.vocabulary = [*_SYMBOLS, *(s + END_OF_WORD for s in _SYMBOLS), *map("".join, merges)]
        self._ids = {symbol: i for i, symbol in enumerate(self.vocabulary)}

    @classmethod
    def from_file(cls, path: Path, max_length: int) -> "ClipTokenizer":
        """Read a file of merges."""
        try:
            return cls(read_bytes(path), max_length)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the tokenizer {path}: {error}") from None

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary) + 2

    def encode(self, prompt: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return [self._ids[symbol] for word in _words(prompt) for symbol in self._merge(word)]

    def _merge(self, word: str) -> list[str]:
        """The symbols of one word: the pair of lowest rank is merged until none is left."""
        symbols = [_SYMBOL_OF[byte] for byte in word.encode()]
        symbols[-1] += END_OF_WORD
        while True:
            ranked = [
                (self._ranks[pair], i)
                for i, pair in enumerate(itertools.pairwise(symbols))
                if pair in self._ranks
            ]
            if not ranked:
                return symbols
            i = min(ranked)[1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]

    def cut(self, prompt: str) -> str:
        """See `Tokenizer.cut`."""
        symbols = "".join(self.vocabulary[i] for i in self.encode(prompt)[self.max_length - 2 :])
        parts = [bytes(_BYTE_OF[c] for c in part) for part in symbols.split(END_OF_WORD)]
        return b" ".join(parts).decode(errors="replace").strip()

    def unknown(self, prompt: str) -> list[str]:
        """Nothing: every character has bytes, and every byte a token."""
        return []

    def __call__(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """See `Tokenizer.__call__`."""
        begin, end = self.vocab_size - 2, self.vocab_size - 1
        rows = [[begin, *self.encode(p)[: self.max_length - 2], end] for p in prompts]
        return padded(rows, self.max_length, pad=end)


def _words(prompt: str) -> list[str]:
    """A prompt's words as CLIP splits it: letters, single digits and the rest separately."""
    text = " ".join(unicodedata.normalize("NFC", prompt).split()).lower()
    # `re` has no \p{L} and \p{N}: find the words in a copy with one ASCII character for each class.
    copy = "".join(c if c.isascii() else _class_of(c) for c in text)
    return [text[slice(*match.span())] for match in _WORD.finditer(copy)]


def _class_of(character: str) -> str:
    if character.isspace():
        return " "
    return {"L": "a", "N": "0"}.get(unicodedata.category(character)[0], "~")


class ClipTextEncoder(TransformerTextEncoder):
    """CLIP's text transformer. Causal, so padding on the right changes no token before it."""

    def __call__(self, tokens: mx.array, mask: mx.array) -> mx.array:
        """See `TextEncoder.__call__`; D is `config.hidden_size`. Any L up to `max_length`."""
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding[:length]
        causal = mx.tril(mx.ones((length, length), mx.bool_))
        for layer in self.layers:
            x = layer(x, causal)
        return self.norm(x)
