"""The Swift package of apps/ios, as far as that can be checked without Swift."""

import json
import re
import struct
import unicodedata
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece

from apps.ios.vectors import PATH, PROMPTS, TOKENIZER, vectors
from convert.mil.program import wire_fields
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.networks.text_encoders.base import normalize
from train.data.stickers.model import STICKERS

ROOT = Path(__file__).parents[2] / "apps/ios"

SOURCES = ROOT / "Sources/SnapGen"


def equal(found, expected):
    """The same JSON values, numbers up to float32's rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(equal, found, expected))
    if isinstance(expected, float):
        return abs(found - expected) <= 5e-6 * max(1, abs(expected))
    return found == expected


@pytest.fixture(scope="module")
def stored():
    return json.loads(PATH.read_text(encoding="utf-8"))


def test_vectors_are_what_this_package_computes(stored):
    found = vectors()
    for key, value in found.items():
        assert equal(stored[key], value), f"{key} changed: python -m apps.ios.vectors"
    assert stored.keys() == found.keys()


# --- the tokenizer's algorithm, as Tokenizer.swift has it --------------------------------------


@pytest.fixture(scope="module")
def pieces():
    found = {}
    fields = [
        value for number, value in wire_fields(memoryview(TOKENIZER.read_bytes())) if number == 1
    ]
    for i, field in enumerate(fields):
        piece = dict(wire_fields(field))
        if piece.get(3, 1) == 1:
            found[bytes(piece[1]).decode()] = i, struct.unpack("<f", piece[2])[0]
    return found


def words(prompt):
    space = {*range(0x1C, 0x20), 0x61C, 0x200B, 0x200C, 0x200E, 0x200F, 0xFEFF, 0xFFFD, 0x2581}
    none = {*range(0x01, 0x09), *range(0x0E, 0x1C), 0x7F, 0x8F, 0x9F}
    text = unicodedata.normalize("NFKC", prompt).lower()
    kept = (" " if ord(c) in space else c for c in text if ord(c) not in none)
    return "".join(kept).split()


def encode(prompt, pieces):
    ids = []
    for word in words(prompt):
        symbols = ["\u2581", *word]
        while True:
            pairs = [(i, symbols[i] + symbols[i + 1]) for i in range(len(symbols) - 1)]
            known = [(-pieces[p][1], i) for i, p in pairs if p in pieces]
            if not known:
                break
            i = min(known)[1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        for symbol in symbols:
            token = pieces.get(symbol, (0,))[0]
            if token or not ids or ids[-1]:
                ids.append(token)
    return ids


def test_the_algorithm_is_sentencepiece(pieces):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    rng = np.random.default_rng(0)
    alphabet = list("abcdefghijklmnopqrstuvwxyz  .,'!0123é—日🦊\u200b\x01")
    noise = ["".join(rng.choice(alphabet, rng.integers(1, 40))) for _ in range(300)]
    for prompt in [*PROMPTS, *noise]:
        assert encode(prompt, pieces) == processor.encode(normalize(prompt)), repr(prompt)


def test_no_token_has_several_words(pieces):
    assert all("\u2581" not in piece[1:] for piece in pieces)


# --- noise, with the numbers that stand in Noise.swift -----------------------------------------


def swift_numbers(name):
    text = (SOURCES / "Noise.swift").read_text(encoding="utf-8").split(f"let {name}")[1]
    body = text.split("= [", 1)[1].split("\n]")[0].split("]]")[0]
    return [float(n) for n in re.findall(r"-?\d[\d_.]*(?:e-?\d+)?", body.replace("_", ""))]


def normal(seed, draw, count):
    """The steps of Noise.swift in numpy."""
    rotations = np.array(swift_numbers("rotations"), int).reshape(2, 4)
    key = [seed >> 32, seed & 0xFFFFFFFF]

    def threefry(first, second):
        keys = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
        x, y = (first + keys[0]) % 2**32, (second + keys[1]) % 2**32
        for i in range(5):
            for r in rotations[i % 2].tolist():
                x = (x + y) % 2**32
                y = (y << r | y >> 32 - r) % 2**32 ^ x
            x, y = (x + keys[(i + 1) % 3]) % 2**32, (y + keys[(i + 2) % 3] + i + 1) % 2**32
        return x, y

    def bits(count):
        half, odd = divmod(count, 2)
        pairs = [threefry(i, i + half + odd) for i in range(half)]
        middle = [threefry(half, 0)[0]] * odd
        return [a for a, _ in pairs] + middle + [b for _, b in pairs]

    for _ in range(draw):
        key = bits(4)[2:]
    one, low = np.float32(1), np.nextafter(np.float32(-1), np.float32(0))
    uniform = np.array(bits(count)).astype(np.float32) / np.float32(2**32 - 1)
    x = np.minimum(uniform, np.nextafter(one, np.float32(0))) * (one - low) + low
    w = -np.log((one - x) * (one + x))
    centre = np.polyval(np.float32(swift_numbers("nearCentre")), w - np.float32(2.5))
    tail = np.polyval(np.float32(swift_numbers("inTail")), np.sqrt(w) - np.float32(3))
    return np.float32(np.sqrt(2)) * np.where(w < 5, centre, tail) * x


def test_noise_is_the_seeds_own(stored):
    assert "0x1BD1_1BDA" in (SOURCES / "Noise.swift").read_text(encoding="utf-8")
    for vector in stored["noise"]:
        channels, height, width = (vector[k] for k in ("channels", "height", "width"))
        drawn = normal(vector["seed"], vector["draw"], channels * height * width)
        latents = drawn.reshape(height, width, channels).transpose(2, 0, 1).reshape(-1)
        np.testing.assert_allclose(latents, vector["latents"], atol=2e-6)


def test_the_error_function_holds_in_the_tails():
    drawn = normal(7, 0, 8000)
    expected = np.array(mx.random.normal((8000,), key=mx.random.key(7)))
    assert abs(expected).max() > 3.3  # the tail begins at 2.93
    np.testing.assert_allclose(drawn, expected, atol=5e-6)


# --- what Swift reads --------------------------------------------------------------------------


def test_config_keys_are_those_that_swift_reads():
    source = (SOURCES / "ModelBundle.swift").read_text(encoding="utf-8")
    config = to_dict(STICKERS)
    for keys in (config["sampler"], ("kind", "max_length"), ("name", "sampler", "few_step")):
        for key in keys:
            head, *rest = key.split("_")
            name = head + "".join(part.capitalize() for part in rest)
            assert re.search(rf"\b(let|var) {name}: ", source), key
    assert {"kind", "max_length"} <= config["text_encoders"][0].keys()
    assert {"name", "sampler", "few_step", "text_encoders"} <= config.keys()


def test_a_prediction_frees_its_arrays_and_a_step_can_be_sent():
    """What `swift test` checks where swift is found."""
    network = (SOURCES / "Network.swift").read_text(encoding="utf-8")
    assert network.count("model.prediction(from:") == 1
    assert network.count("predict(inputs)") == 1
    assert "autoreleasepool { try predict(inputs) }" in network
    generator = (SOURCES / "Generator.swift").read_text(encoding="utf-8")
    assert "public struct Step: @unchecked Sendable {" in generator
    assert "AsyncThrowingStream" not in generator  # its end does not wait for a prediction


def test_swift_test_runs_in_swift_6_mode_with_stand_ins_off_apple_only():
    package = (ROOT / "Package.swift").read_text(encoding="utf-8")
    assert package.startswith("// swift-tools-version: 6.0\n")
    assert "swiftLanguageModes: [.v6]" in package
    apple, elsewhere = re.search(
        r"#if canImport\(Darwin\)(.*)#else(.*)#endif", package, re.DOTALL
    ).groups()
    names = sorted(path.name for path in (ROOT / "Tests/StandIns").iterdir())
    assert re.findall(r'"(\w+)"', apple) == []
    assert re.findall(r'"(\w+)"', elsewhere) == names == ["CoreGraphics", "CoreML"]
    ci = (ROOT.parents[1] / ".ci/run").read_text(encoding="utf-8")
    assert re.search(r"if swift --version .*\n\s+swift test .*--package-path apps/ios", ci)


FILES = [path for path in sorted(ROOT.rglob("*.swift")) if ".build" not in path.parts]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_swift_parses(path):
    why = "parsing Swift needs a grammar: pip install tree-sitter tree-sitter-swift"
    tree_sitter = pytest.importorskip("tree_sitter", reason=why)
    swift = pytest.importorskip("tree_sitter_swift", reason=why)
    parser = tree_sitter.Parser(tree_sitter.Language(swift.language()))
    faults, nodes = [], [parser.parse(path.read_bytes()).root_node]
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.type == "ERROR" or node.is_missing:
            faults.append(f"line {node.start_point[0] + 1}: {node.text.decode()[:40]}")
    assert not faults
    assert all(len(line) <= 100 for line in path.read_text(encoding="utf-8").splitlines())
