"""Kernels that MLX compiles on Linux are in a folder that no other user can write to."""

import os
import stat
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest

from apps.worker import engine
from mlx_snapgen._kernel_cache import make_private_cache
from tests.layout.graph import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX has no such cache elsewhere")

COMPILE = """
import mlx.core as mx
import os, tempfile
from mlx_snapgen.errors import run_command

def main():
    mx.eval(mx.compile(lambda x: mx.exp(x) * 2 + 1)(mx.ones(4)))
    print(os.environ["TMPDIR"])
    print(tempfile.gettempdir())
    print(oct(os.stat(os.environ["TMPDIR"]).st_mode)[-3:])

run_command(main)
"""


def run(cache, temporary, code=COMPILE):
    """Folder of the kernels, Python's temporary folder, and the first's mode, of a command."""
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(temporary)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_without_a_folder_to_write_into_the_package_is_imported(tmp_path, monkeypatch):
    def refuse():
        raise FileNotFoundError

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    for name in ("TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert make_private_cache() == tmp_path / "mlx_snapgen" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.delenv("TMPDIR")
    assert make_private_cache() is None


def test_an_import_makes_no_folder_and_sets_nothing(tmp_path):
    code = "import os, mlx_snapgen.generate; print(os.environ['TMPDIR'])"
    assert run(tmp_path / "cache", tmp_path / "own", code) == [str(tmp_path / "own")]
    assert not (tmp_path / "cache").exists() and not list((tmp_path / "own").iterdir())


def test_a_loaded_pipeline_compiles_into_a_private_folder(tmp_path):
    code = """
import os
from mlx_snapgen import SnapGenPipeline
SnapGenPipeline.from_pretrained()
first = os.environ["TMPDIR"]
SnapGenPipeline.from_pretrained()
print(first, os.environ["TMPDIR"])
"""
    folder = str(tmp_path / "cache/mlx_snapgen/kernels")
    assert run(tmp_path / "cache", tmp_path / "own", code) == [folder, folder]
    (tmp_path / "no").write_text("")
    first, second = run(tmp_path / "no", tmp_path / "own", code)
    assert first == second and first.startswith(str(tmp_path / "own/mlx_snapgen-kernels-"))


def test_the_worker_compiles_into_a_private_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", tempfile.tempdir)
    monkeypatch.setattr(engine.signal, "signal", lambda *_: None)
    monkeypatch.setattr(engine.tqdm, "set_lock", lambda *_: None)
    for name in ("TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    seen = []
    running = SimpleNamespace(run=lambda: seen.append(os.environ["TMPDIR"]))
    monkeypatch.setattr(engine, "Engine", lambda *_: running)
    engine.serve(None)
    assert seen == [str(tmp_path / "mlx_snapgen" / "kernels")]


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_kernels_are_compiled_into_a_private_folder(tmp_path):
    kernels, own, _ = run(tmp_path / "cache", tmp_path / "shared")
    assert kernels == str(tmp_path / "cache/mlx_snapgen/kernels")
    assert mode(kernels) == mode(tmp_path / "cache/mlx_snapgen") == 0o700
    assert list((tmp_path / "cache").glob("mlx_snapgen/kernels/mlx/*/cpu/*.so"))
    assert own == str(tmp_path / "shared")
    assert not list((tmp_path / "shared").iterdir())


@pytest.mark.parametrize("kind", ["link", "open to all", "file"])
def test_a_folder_that_others_could_have_filled_is_not_used(kind, tmp_path):
    place, planted = tmp_path / "cache/mlx_snapgen/kernels", tmp_path / "planted"
    place.parent.mkdir(parents=True)
    planted.mkdir()
    if kind == "link":
        place.symlink_to(planted)
    elif kind == "file":
        place.write_text("")
    else:
        place.mkdir()
        (place / "mlx").mkdir()
        place.chmod(0o777)
    kernels, _, permissions = run(tmp_path / "cache", tmp_path / "shared")
    assert kernels.startswith(str(tmp_path / "shared/mlx_snapgen-kernels-"))
    assert permissions == "700"
    assert not list((tmp_path / "shared").iterdir())  # deleted at the end
    assert not list(planted.iterdir())
