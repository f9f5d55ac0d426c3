"""What the tests share: above all a tiny random model in the full format."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_snapgen import errors
from mlx_snapgen._kernel_cache import make_private_cache
from mlx_snapgen.checkpoint.model import Components, save_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.teachers import folder as teacher_folder
from tests import tiny
from train.data.stickers.render import find_font
from train.data.stickers.vocabulary import FLUENT

make_private_cache()  # as commands do
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell without job control starts background jobs deaf to Ctrl-C, and their children too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def font() -> Path:
    try:
        return find_font()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def fluent_pictures(tmp_path_factory) -> Path:
    """A stand-in for the npm package: for each noun a disk of a color that `recolor` finds."""
    root = tmp_path_factory.mktemp("fluent")
    folder = root / "package" / "assets"
    folder.mkdir(parents=True)
    y, x = np.mgrid[:256, :256] - 127.5
    alpha = np.rint(255 * np.clip(100 - np.hypot(x, y), 0, 1)).astype(np.uint8)
    for k, noun in enumerate(FLUENT.nouns):
        color = (200, 200, 200) if noun.is_gray else (230, 20 + k % 200, 20)
        rgb = np.broadcast_to(np.uint8(color), (256, 256, 3))
        rgba = Image.fromarray(np.concatenate([rgb, alpha[..., None]], axis=-1))
        name = "-".join(f"{ord(c):04x}" for c in noun.emoji if c != "\N{VARIATION SELECTOR-16}")
        rgba.save(folder / f"{name}.webp", lossless=True, quality=0, method=0)
    return root


@pytest.fixture(scope="session")
def tokenizer_bytes() -> bytes:
    return tiny.tokenizer_bytes()


@pytest.fixture(scope="session")
def components() -> Components:
    """Random weights, two text encoders, all three widths. Tests leave it as it is."""
    return tiny.make_components()


@pytest.fixture(scope="session")
def model_folder(components, tmp_path_factory):
    """`components` on disk. Tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("model") / "random"
    save_pretrained(folder, components)
    return folder


@pytest.fixture(autouse=True)
def own_names(monkeypatch):
    """Folders that a test fetches by a name have it in that test alone."""
    monkeypatch.setattr(errors, "_given", {})


@pytest.fixture
def no_language_model(monkeypatch):
    """Public teachers encode prompts with `tiny.Reader`."""
    monkeypatch.setattr(teacher_folder, "load_qwen", lambda *_, **__: tiny.Reader())


@pytest.fixture
def disk(tmp_path):
    """Size, such as "2m" -> an empty folder on a disk of its own; only root can mount one."""
    mounted = []

    def make(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root can mount a disk, on Linux")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
