"""`python -m convert.parity`: that it measures what it says, and sees what is wrong."""

import sys

import mlx.core as mx
import pytest

from convert.parity import __main__ as parity
from convert.parity import text_encoders
from mlx_snapgen.errors import UserError


def library(kind):
    for package in parity.PORTS[kind].packages:
        pytest.importorskip(package, reason="parity needs the originals: pip install '.[parity]'")


@pytest.mark.parametrize("kind", parity.PORTS)
def test_every_port_says_what_its_original_says(kind):
    library(kind)
    rows = parity.measure(kind)
    assert rows
    assert all(0 <= difference < 1e-4 for _, difference in rows)


def test_a_users_own_folder_is_compared_and_a_difference_is_seen(tmp_path, monkeypatch, capsys):
    library("clip")
    parity.PORTS["clip"].make(tmp_path / "mine")
    command = ["parity", "--source", str(tmp_path / "mine")]
    monkeypatch.setattr(sys, "argv", command)
    assert parity.main() == 0
    assert "mine" in capsys.readouterr().out
    load = text_encoders.load_clip

    def broken(folder):
        encoder = load(folder)
        encoder.layers[0].linear1.bias = encoder.layers[0].linear1.bias + 0.1
        return encoder

    monkeypatch.setattr(text_encoders, "load_clip", broken)
    assert parity.main() == 1


def test_without_the_libraries_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"this needs torch, transformers: pip install"):
        parity.measure("clip")
    monkeypatch.setattr(sys, "argv", ["parity"])
    with pytest.raises(UserError, match="no original library is installed"):
        parity.main()
    assert capsys.readouterr().out.count("skipped: ") == len(parity.PORTS)
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {"x.lora_A.weight": mx.zeros((2, 2))})
    with pytest.raises(UserError, match="is a lora, which no library here can run"):
        parity.kind_of(str(path))
