"""MiniT2I's Core ML packages, run in numpy: they compute what MLX does."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest

from convert.coreml import __main__ as command
from convert.mil.execution import Interpreter
from convert.parity.minit2i import make_whole_minit2i
from mlx_snapgen.errors import UserError
from mlx_snapgen.public.teachers import convert_teacher
from mlx_snapgen.teachers.folder import load_flow_teacher
from tests.tiny import TEACHER, require, write_teacher

require("torch", "coremltools", "transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("minit2i")
    make_whole_minit2i(root)
    convert_teacher(root / "minit2i-b-16", root / "teacher")
    return root / "teacher"


def export(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["coreml", *map(str, options)])
    command.main()


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-5), ("float16", 5e-3)])
def test_the_packages_compute_what_mlx_does(folder, tmp_path, monkeypatch, precision, most):
    out = tmp_path / "out"
    export(monkeypatch, folder, out, "--precision", precision)
    assert json.loads((out / "config.json").read_text())["kind"] == "minit2i"
    teacher, _ = load_flow_teacher(folder)
    network, encoder = (
        Interpreter(out / f"{name}.mlpackage") for name in ("Transformer", "TextEncoder")
    )
    row = teacher.prompts.tokenizer.encode("a red apple", max_length=256)
    tokens, mask = np.zeros((1, 256), np.int32), np.zeros((1, 256), np.float32)
    tokens[0, : len(row)], mask[0, : len(row)] = row, 1
    text = encoder({"tokens": tokens, "mask": mask})["text"].astype(np.float32)
    states, _ = teacher.prompts(["a red apple"])
    assert relative(text[0, : len(row)], np.array(states)[0, : len(row)]) < 1e-5
    x_t = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    for counts, t in ((mask, 0.7), (0 * mask, 0.01)):
        given = {"x_t": x_t.transpose(0, 3, 1, 2), "t": np.array([t], np.float32)}
        found = network(given | {"text": text, "mask": counts})["velocity"]
        expected = teacher.network(*map(mx.array, (x_t, [t], text, counts > 0)))
        assert relative(found.transpose(0, 2, 3, 1), np.array(expected)) < most


def test_what_does_not_fit_is_one_line(folder, tmp_path, monkeypatch):
    for option, value in (("--quantize", "4.3"), ("--height", "32")):
        with pytest.raises(UserError, match="only --target and --precision fit it"):
            export(monkeypatch, folder, tmp_path / "out", option, value)
    other = write_teacher(tmp_path / "other", TEACHER)
    with pytest.raises(UserError, match="Qwen-Image cannot be exported to Core ML, only MiniT2I"):
        export(monkeypatch, other, tmp_path / "out")
