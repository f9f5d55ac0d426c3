"""Mistakes and damage in a user's own data, by the commands: one clear line and exit code 2."""

import json
import sys
import tarfile

import mlx.core as mx
import pytest

from mlx_snapgen import files
from mlx_snapgen.checkpoint.model import save_pretrained
from mlx_snapgen.errors import run_command
from tests import tiny
from tests.training.test_prepare import write_pictures
from train import export, flow, kdmd, prepare
from train.loop.checkpoint import latest_checkpoint

pytestmark = pytest.mark.usefixtures("quick")

COUNT = 6


@pytest.fixture
def fails(monkeypatch, capsys):
    """The error of a command, which is one line."""

    def call(command, *options):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, options)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command(command.main)
        *before, last = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2
        assert last.startswith("error: ") and not any("error" in line for line in before)
        return last.removeprefix("error: ")

    return call


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set", COUNT)


@pytest.fixture(scope="module")
def prepared(pictures, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "set"
    given = [pictures, "--output", folder, "--model", model_folder, "--resolution", 64]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare", *map(str, given)])
        prepare.main()
    return folder


def training(model, run_dir, data, *more):
    common = ["--batch-size", 2, "--validation-prompts", "a red car", "--model-widths", "tiny"]
    return ["--model", model, "--run-dir", run_dir, "--data", data, "--steps", 1, *common, *more]


def test_a_truncated_tar_gives_its_whole_pictures(pictures, model_folder, run, tmp_path, capsys):
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    with tarfile.open(whole, "w") as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, path.name)
    size = len(whole.read_bytes().rstrip(b"\0"))
    cut.write_bytes(whole.read_bytes()[: size // 2])
    made = tmp_path / "made"
    run(prepare, cut, "--output", made, "--model", model_folder, "--resolution", 64)
    report = json.loads((made / "report.json").read_text())
    assert 0 < report["kept"] < COUNT and report["skipped"]["damaged tar"] == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert f"{report['kept']} pictures" in said and "1 skipped: damaged tar" in said
    run(flow, *training(model_folder, tmp_path / "run", cut, "--resolution", 64))
    assert latest_checkpoint(tmp_path / "run").name == "step_1"


def test_empty_captions_and_broken_pictures_are_counted(model_folder, run, tmp_path, capsys):
    write_pictures(tmp_path / "source", 4)
    (tmp_path / "source" / "000.txt").write_text(" \n")
    (tmp_path / "source" / "001.png").write_bytes(b"no picture")
    options = ["--output", tmp_path / "made", "--model", model_folder, "--resolution", 64]
    run(prepare, tmp_path / "source", *options)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "2 pictures" in said and "1 skipped: empty caption" in said
    lines = (tmp_path / "made" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["000.png", "001.png"]


def test_a_parquet_file_without_the_column(model_folder, fails, tmp_path):
    tiny.require("pyarrow")
    from pyarrow import parquet, table

    parquet.write_table(table({"image": [b"x"], "text": ["a"]}), tmp_path / "a.parquet")
    options = ["--output", tmp_path / "made", "--model", model_folder, "--captions", "txet"]
    error = fails(prepare, tmp_path / "a.parquet", *options)
    assert "no column txet (did you mean 'text'?)" in error
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ("nowhere", [], "no such file or folder: nowhere"),
        ("prepared", ["--resolution", 32], "was prepared at 64 pixels, not at --resolution 32"),
        ("pictures", ["--min-caption", 99], "6 skipped, such as 000.png: caption too short"),
        (
            "pictures",
            ["--captions", "txet"],
            "6 skipped, such as 000.png: no caption (it has: text)",
        ),
    ],
)
def test_data_that_cannot_be_used(data, more, message, model_folder, fails, tmp_path, request):
    given = data if data == "nowhere" else request.getfixturevalue(data)
    options = training(model_folder, tmp_path / "run", given, *more)
    assert message in fails(flow, *options)
    assert not (tmp_path / "run" / "settings.json").exists()
    lora = ["--output", tmp_path / "k.safetensors"]
    assert message in fails(kdmd, *options, *lora)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """Other sizes, and an autoencoder with other weights."""
    components = tiny.make_components(tiny.STUDENT)
    tiny.randomize(components.autoencoder, 77)
    folder = tmp_path_factory.mktemp("other") / "other"
    save_pretrained(folder, components)
    return folder


def test_data_and_runs_of_another_model(
    prepared, pictures, model_folder, other_model, run, fails, tmp_path
):
    error = fails(flow, *training(other_model, tmp_path / "run", prepared))
    assert "latents of another autoencoder" in error
    more = "--resolution", 64
    run(flow, *training(model_folder, tmp_path / "run", pictures, *more))
    before = (tmp_path / "run" / "settings.json").read_bytes()
    again = training(other_model, tmp_path / "run", pictures, *more, "--steps", 2)
    assert "(use another run folder)" in fails(flow, *again)
    assert (tmp_path / "run" / "settings.json").read_bytes() == before


def test_a_full_disk_leaves_a_run_that_resumes(
    prepared, model_folder, run, fails, tmp_path, monkeypatch
):
    options = training(model_folder, tmp_path / "run", prepared)

    def full(*_):
        raise RuntimeError("[write] Unable to write 4096 bytes to file.")

    run(flow, *options)
    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", full)
        patch.setattr(files, "FULL", 2**62)
        error = fails(flow, *options, "--steps", 2)
        assert "the last checkpoint is" in error and "step_1: free some space and run" in error
        made = tmp_path / "made"
        error = fails(export, "--run", tmp_path / "run", "--output", made)
        assert "No space left on device" in error or "is full" in error
    assert latest_checkpoint(tmp_path / "run").name == "step_1" and not made.exists()
    run(flow, *options, "--steps", 2)
    assert latest_checkpoint(tmp_path / "run").name == "step_2"
