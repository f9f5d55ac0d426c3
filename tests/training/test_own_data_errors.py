"""Mistakes and damage in a user's own data, by the commands: one clear line and exit code 2."""

import argparse
import dataclasses
import importlib
import json
import re
import shutil
import sys
import tarfile

import mlx.core as mx
import pytest

from mlx_snapgen import files
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import save_pretrained
from mlx_snapgen.checkpoint.runs import command_of
from mlx_snapgen.errors import run_command
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from tests import tiny
from tests.training.test_prepare import write_pictures
from train import autoencoder, evaluate, export, flow, kd, kdmd, lora, new, prepare, tokenizer
from train.evaluation.memory import training_memory
from train.loop.checkpoint import latest_checkpoint
from train.loop.teacher import open_teacher

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


def test_pictures_that_do_not_fit_into_memory(
    pictures, model_folder, run, monkeypatch, fails, tmp_path, capsys
):
    options = ["--output", tmp_path / "made", "--model", model_folder]
    flow_options = training(model_folder, tmp_path / "run", pictures)
    monkeypatch.setattr("mlx_snapgen.settings.machine_memory", lambda: 2**34)
    for command, given in (
        (prepare, [pictures, *options]),
        (flow, flow_options),
        (kdmd, [*flow_options, "--student-every", 1, "--output", tmp_path / "k.safetensors"]),
    ):
        error = fails(command, *given, "--resolution", 16384)
        assert "16384 x 16384 takes at least 150.0 GiB of memory" in error
    given = ["--data", pictures, "--run-dir", tmp_path / "a"]
    for name in ("--resolution", "--crop"):
        assert "GiB of memory" in fails(autoencoder, *given, "--batch-size", 64, name, 16384)
    # What an autoencoder needs is measured.
    resolution = "--resolution", 64
    with monkeypatch.context() as patch:
        patch.setattr("train.data.encoded.machine_memory", lambda: 0)
        error = fails(prepare, pictures, *options, *resolution)
        assert "encoding 8 pictures of 64 x 64 at a time takes about" in error
        assert "choose a smaller --resolution" in error
        assert "encoding 2 pictures of 64 x 64" in fails(flow, *flow_options, *resolution)
    assert not (tmp_path / "made").exists() and not (tmp_path / "run" / "step_1").exists()
    # Of a step, calculated: twice the memory is refused, and more than there is gets a line.
    monkeypatch.setattr("train.setup.supernetwork.machine_memory", lambda: 1)
    error = fails(flow, *flow_options, *resolution)
    assert "a step takes about" in error and "--batch-size with --accumulate, or --save-m" in error
    calculated = training_memory(
        ModelFolder.open(model_folder).config.transformer, latents=(8, 8), batch_size=2
    )
    monkeypatch.setattr("train.setup.supernetwork.machine_memory", lambda: calculated * 2 // 3)
    capsys.readouterr()
    run(flow, *flow_options, *resolution)
    assert "warning: a step takes about 0.0 GiB" in capsys.readouterr().err


def test_empty_captions_and_broken_pictures_are_counted(model_folder, run, tmp_path, capsys):
    write_pictures(tmp_path / "source", 8)
    (tmp_path / "source" / "000.txt").write_text(" \n")
    (tmp_path / "source" / "001.png").write_bytes(b"no picture")
    (tmp_path / "source" / "002.txt").unlink()
    data = (tmp_path / "source" / "003.png").read_bytes()
    (tmp_path / "source" / "003.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "source" / "004.txt").write_bytes(b"\xff")
    options = ["--output", tmp_path / "made", "--model", model_folder, "--resolution", 64]
    run(prepare, tmp_path / "source", *options)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "3 pictures" in said and "1 skipped: empty caption" in said
    assert said.endswith(f"; 2 more skipped, see {tmp_path}/made/skipped.jsonl")
    lines = (tmp_path / "made" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [f"00{k}.png" for k in range(5)]


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
            "6 skipped, such as 000.png: no caption (no txet (did you mean 'text'?); it has: text;",
        ),
    ],
)
def test_data_that_cannot_be_used(data, more, message, model_folder, fails, tmp_path, request):
    given = data if data == "nowhere" else request.getfixturevalue(data)
    options = training(model_folder, tmp_path / "run", given, *more)
    assert message in fails(flow, *options)
    assert not (tmp_path / "run" / "settings.json").exists()
    lora = ["--student-every", 1, "--output", tmp_path / "k.safetensors"]
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


def prepare_options(pictures, output, model, *more):
    return [pictures, "--output", output, "--model", model, "--resolution", 64, *more]


def test_a_shard_of_another_set_is_refused(prepared, pictures, model_folder, run, fails, tmp_path):
    """With the same arrays: training would not notice."""
    other, made = tmp_path / "other", tmp_path / "made"
    run(prepare, *prepare_options(pictures, other, model_folder, "--batch-size", 3))
    shutil.copytree(prepared, made)
    shard = "shards/000000.safetensors"
    shutil.copy(other / shard, made / shard)
    message = f"{made / shard} belongs to another set"
    assert message in fails(flow, *training(model_folder, tmp_path / "run", made))
    shutil.copy(prepared / shard, made / shard)
    index = json.loads((made / "index.json").read_text())
    for counts in (index["shards"][0]["counts"], index["buckets"][0]):
        counts[0] -= 1000
        (made / "index.json").write_text(json.dumps(index))
        error = fails(flow, *training(model_folder, tmp_path / "run", made))
        assert "index.json is damaged: delete it, and run train.prepare again" in error
        counts[0] += 1000
    row = next(i for i, n in enumerate(index["shards"][0]["counts"]) if n)
    index["shards"][0]["counts"][row] += 1
    (made / "index.json").write_text(json.dumps(index))
    assert message in fails(flow, *training(model_folder, tmp_path / "run", made))


def test_data_that_is_all_kept_for_validation(
    pictures, model_folder, run, fails, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prepare, "LEAST_TO_HOLD_OUT", 1)
    made = tmp_path / "made"
    run(prepare, *prepare_options(pictures, made, model_folder, "--held-out", 0.9999))
    assert json.loads((made / "report.json").read_text())["training"] == 0
    assert (made / "sheet.png").exists()
    message = "has no pictures for training: prepare them with a lower --held-out"
    options = training(model_folder, tmp_path / "run", made)
    assert message in fails(flow, *options)
    lora = ["--student-every", 1, "--output", tmp_path / "k.safetensors"]
    assert message in fails(kdmd, *options, *lora)
    measured = ["--model", model_folder, "--data", made, "--model-widths", "tiny"]
    run(evaluate, *measured, "--steps", 1)
    assert f"{COUNT} pictures" in capsys.readouterr().err
    index = json.loads((made / "index.json").read_text())
    (made / "index.json").write_text(json.dumps(index | {"shards": []}))
    assert message in fails(evaluate, *measured)


def test_a_run_folder_of_something_else_stays_as_it_is(prepared, model_folder, fails, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(prepared / "settings.json", unfinished)
    for folder in (prepared, unfinished, model_folder):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        error = fails(flow, *training(model_folder, folder, prepared))
        assert f"{folder} holds no run, but " in error
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_run_that_was_killed_before_its_first_checkpoint_belongs_to_its_command(
    prepared, model_folder, run, fails, tmp_path
):
    folder = tmp_path / "run"
    options = training(model_folder, folder, prepared)
    run(flow, *options)
    shutil.rmtree(folder / "step_1")
    assert latest_checkpoint(folder) is None
    record = (folder / "settings.json").read_bytes()
    error = fails(kd, *options, "--teacher", model_folder)
    assert error == (
        f"argument --run-dir: {folder} holds a run of train.flow: give another folder, or delete "
        "it: it has no checkpoint yet; see --help"
    )
    assert (folder / "settings.json").read_bytes() == record
    run(flow, *options, "--mask-ratio", 0.2)  # nothing is lost
    assert latest_checkpoint(folder).name == "step_1"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (kd, "--teacher"),
        (kdmd, "--teacher"),
        (prepare, "--teacher"),
        (flow, "--init-from"),
        (autoencoder, "--init-from"),
        (autoencoder, "--encoder"),
    ],
)
def test_a_missing_model_is_found_before_the_data_is_read(
    command, option, pictures, prepared, model_folder, fails, monkeypatch, tmp_path
):
    for place in ("setup.data", "autoencoder"):
        monkeypatch.setattr(f"train.{place}.data_from", None)
    monkeypatch.setattr("train.prepare.open_records", None)
    options = training(model_folder, tmp_path / "run", prepared)
    if command is kdmd:
        options += ["--student-every", 1, "--output", tmp_path / "x.safetensors"]
    if command is prepare:
        options = [pictures, "--output", tmp_path / "set", "--model", model_folder]
    if command is autoencoder:
        options = ["--run-dir", tmp_path / "run", "--data", pictures]
    if option == "--encoder":
        options += ["--init-from", model_folder, "--decoder-only"]
    missing = tmp_path / "nothing"
    assert f"{missing}" in fails(command, *options, option, missing)


@pytest.mark.parametrize("command", ["autoencoder", "flow", "kd", "kdmd", "lora"])
def test_a_run_is_not_written_among_the_pictures(command, pictures, model_folder, fails, tmp_path):
    given = ["--data", pictures]
    if command != "autoencoder":
        given += ["--model", model_folder]
    if command in ("kdmd", "lora"):
        given += ["--output", tmp_path / "lora.safetensors"]
    if command == "kd":
        given += ["--teacher", model_folder]
    before = sorted(pictures.iterdir())
    module = importlib.import_module(f"train.{command}")
    error = fails(module, *given, "--run-dir", pictures)
    assert error == f"--run-dir {pictures} has the pictures: give a folder elsewhere"
    error = fails(module, *given, "--run-dir", pictures / "run")
    assert "is inside" in error and sorted(pictures.iterdir()) == before


OUTPUTS = {
    "evaluate": ("--output", "out"),
    "kdmd": ("--run-dir", "{}/run", "--output", "a.safetensors"),
    "lora": ("--output", "a.safetensors"),
    "new": (
        "--preset=tiny",
        "--autoencoder={}/model",
        "--tokenizer",
        "{}/own.model",
        "--output",
        "out",
    ),
    "tokenizer": ("--output", "a.model"),
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_outputs_are_not_written_among_the_pictures(
    command, pictures, model_folder, fails, tmp_path
):
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "own.model").write_bytes(tiny.tokenizer_bytes())
    given = ["--data", pictures] + ["--model", model_folder] * (command not in ("new", "tokenizer"))
    *more, name = [word.format(tmp_path) for word in OUTPUTS[command]]
    before = sorted(pictures.iterdir())
    module = importlib.import_module(f"train.{command}")
    error = fails(module, *given, *more, pictures / name)
    assert f"--output {pictures / name} is inside {pictures}, which has the pictures" in error
    assert sorted(pictures.iterdir()) == before


def test_the_default_run_of_a_lora_gets_no_captions_of_its_samples(
    pictures, model_folder, fails, monkeypatch
):
    monkeypatch.chdir(pictures)
    given = ["--data", ".", "--model", model_folder, "--caption-template"]
    assert "give a folder elsewhere" in fails(lora, *given, "a {}")
    assert "put {} where the name belongs" in fails(lora, *given, "a")


def test_class_folders_without_a_template_are_told_of_it(model_folder, fails, tmp_path):
    classes = write_pictures(tmp_path / "classes" / "red_car", 2)
    for text in classes.glob("*.txt"):
        text.unlink()
    (classes / "metadata.jsonl").unlink(missing_ok=True)
    data, model = ["--data", classes.parent], ["--model", model_folder]
    for command, given in (
        (lora, [*data, *model, "--output", tmp_path / "a.safetensors"]),
        (flow, [*data, *model, "--run-dir", tmp_path / "run"]),
        (tokenizer, [*data, "--output", tmp_path / "a.model"]),
        (prepare, [classes.parent, *model, "--output", tmp_path / "set"]),
    ):
        error = fails(command, *given)
        assert "--caption-template 'a photo of a {}' makes" in error


def test_models_that_are_not_trained_are_told_of(pictures, components, run, tmp_path, capsys):
    network = EfficientDiT(components.config.transformer)
    save_pretrained(tmp_path / "new", dataclasses.replace(components, transformer=network))
    (tmp_path / "prompts.txt").write_text("a car")
    drawing = ["--draw-with", tmp_path / "new", "--prompts-file", tmp_path / "prompts.txt"]
    tuning = ["--data", pictures, "--model", tmp_path / "new", "--prior-weight", 0]
    for command, given in (
        (prepare, [*drawing, "--output", tmp_path / "set", "--steps", 1]),
        (lora, [*tuning, "--output", tmp_path / "a.safetensors", "--steps", 1]),
    ):
        run(command, *given, "--dry-run")
        assert f"warning: {tmp_path / 'new'} is not trained yet: " in capsys.readouterr().err
    teacher = argparse.Namespace(teacher=tmp_path / "new", teacher_revision=None, teacher_base=None)
    open_teacher(teacher)
    assert "is not trained yet: the student learns noise" in capsys.readouterr().err
    save_pretrained(tmp_path / "trained", components)
    teacher.teacher = tmp_path / "trained"
    open_teacher(teacher)
    assert capsys.readouterr().err == ""


COMMANDS = [
    ({"few_step": {}, "teacher_digest": "a", "options": {}}, "train.kdmd"),
    ({"model": "m", "rank": 4}, "train.lora"),
    ({"model": "m", "average_bits": 5}, "train.palettes"),
    ({"autoencoder": {}}, "train.autoencoder"),
    ({"model": "m", "teacher_digest": "a", "options": {}}, "train.kd"),
    ({"model": "m", "autoencoder": "a", "options": {"mask_ratio": 0}}, "train.flow"),
    ({"model": "m"}, None),  # an earlier version's
    ({"options": 1}, None),
]


@pytest.mark.parametrize(("record", "command"), COMMANDS)
def test_the_command_of_a_run(record, command, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(record))
    assert command_of(tmp_path) == command


@pytest.mark.parametrize("option", ["--model", "--run-dir", "--data"])
def test_an_empty_name(option, prepared, model_folder, fails, tmp_path):
    """As of a variable of the shell that is not set: it would be the current folder."""
    options = training(model_folder, tmp_path / "run", prepared, option, "")
    assert "the name of a file or folder is empty" in fails(flow, *options)


def test_columns_of_captions_that_are_not_there(
    pictures, model_folder, run, fails, tmp_path, capsys
):
    made = prepare_options(pictures, tmp_path / "made", model_folder, "--captions", "text")
    assert "text is there twice" in fails(prepare, *made, "text")
    run(prepare, *made, "txet", "--dry-run")
    message = f"warning: none of the first {COUNT} pictures has a caption 'txet'"
    assert message in capsys.readouterr().err.splitlines()


def test_options_that_change_when_a_run_is_resumed(
    prepared, pictures, model_folder, run, fails, tmp_path, capsys
):
    options = training(model_folder, tmp_path / "run", prepared)
    run(flow, *options)
    capsys.readouterr()
    run(flow, *options, "--steps", 2, "--drop-caption", 0.5, "--mask-ratio", 0.2)
    said = capsys.readouterr().err.splitlines()
    line = "resuming with other settings: --drop-caption 0.1 -> 0.5, --mask-ratio 0.0 -> 0.2"
    assert line in said
    record = (tmp_path / "run" / "settings.json").read_text()
    run(flow, *options, "--steps", 2, "--model-widths", "small", "--time-shift", 5)
    said = capsys.readouterr().err
    assert f"without effect, because {tmp_path / 'run'} is complete: --drop-caption 0.5 ->" in said
    assert "--model-widths tiny -> small" in said
    assert "resuming with other" not in said
    assert (tmp_path / "run" / "settings.json").read_text() == record
    error = fails(flow, *options, "--steps", 3, "--optimizer", "adamw")
    assert "was trained with --optimizer muon, not adamw: give muon" in error
    moved = tmp_path / "moved"
    shutil.copytree(model_folder, moved)
    run(flow, *options, "--steps", 2, "--model", moved, "--learning-rate", 1e-5)
    said = capsys.readouterr().err.splitlines()
    change = f"{model_folder.resolve()} -> {moved.resolve()}"
    assert f"recorded in {tmp_path / 'run'}, which is complete: --model {change}" in said
    rate = "--learning-rate 0.0003 -> 1e-05"
    assert f"without effect, because {tmp_path / 'run'} is complete: {rate}" in said
    assert not [line for line in said if line.startswith("resuming")]
    record = (tmp_path / "run" / "settings.json").read_text()
    config = json.loads((moved / "config.json").read_text())
    config["transformer"]["num_bands"] = 1
    (moved / "config.json").write_text(json.dumps(config))
    error = fails(flow, *options, "--steps", 3, "--model", moved)
    assert "a run with other settings of the networks to train:" in error
    lora = tmp_path / "lora.safetensors"
    error = fails(kdmd, *options[:6], "--batch-size", 2, "--output", lora)
    assert f"{tmp_path / 'run'} holds a run of train.flow: give another folder" in error
    made = tmp_path / "set"
    shutil.copytree(tmp_path / "run", made)
    error = fails(prepare, *prepare_options(pictures, made, model_folder))
    assert f"{made} holds a run of train.flow: give another folder" in error
    assert (tmp_path / "run" / "settings.json").read_text() == record
    for name, value in (("image_size", [1]), ("trained_sizes", [3]), ("time_shift", "x")):
        changed = json.dumps(json.loads(record) | {name: value})
        (tmp_path / "run" / "settings.json").write_text(changed)
        error = fails(export, "--run", tmp_path / "run", "--output", tmp_path / "model")
        assert "settings.json is damaged: delete it, and give --model" in error
    for what, folder in (("of pictures", pictures), ("that train.prepare wrote", prepared)):
        line = f"{folder} is a folder {what}, not of a run or a model: give one of these"
        assert fails(export, "--run", folder, "--output", tmp_path / "model") == line
        start = ["--decoder-only", "--init-from", folder, "--run-dir", tmp_path / "new"]
        assert fails(autoencoder, "--data", pictures, *start) == line
        given = ["--autoencoder", folder, "--tokenizer", tmp_path / "not.there"]
        assert fails(new, tmp_path / "made", "--preset", "tiny", *given) == line
    (tmp_path / "begun" / "samples").mkdir(parents=True)
    (tmp_path / "begun" / "settings.json").write_text(record)
    shutil.copy(pictures / "000.png", tmp_path / "begun" / "samples")
    error = fails(export, "--run", tmp_path / "begun", "--output", tmp_path / "model")
    assert "begun holds no checkpoint: train it first" in error
    (tmp_path / "run" / "settings.json").write_text(record)
    made = ["--output", tmp_path / "made", "--preset", model_folder]
    tokenizer = tmp_path / "own.model"
    tokenizer.write_bytes(tiny.tokenizer_bytes())
    error = fails(new, *made, "--autoencoder", tmp_path / "run", "--tokenizer", tokenizer)
    assert "run is a run of train.flow: give one of train.autoencoder, or a model" in error


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        ({"rank": 4, "model": "stickers"}, r"train\.lora: .* generate --lora FILE"),
        ({"average_bits": 5, "model": "stickers"}, r"train\.palettes: .* folder of its --output"),
        ({"autoencoder": {}}, r"train\.autoencoder: give it to train\.new --autoencoder"),
    ],
)
def test_runs_without_a_model_to_export(record, hint, model_folder, fails, tmp_path):
    (tmp_path / "run" / "step_3").mkdir(parents=True)
    (tmp_path / "run" / "settings.json").write_text(json.dumps(record))
    for more in ([], ["--model", model_folder]):
        error = fails(export, "--run", tmp_path / "run", "--output", tmp_path / "model", *more)
        assert re.match(rf"{tmp_path / 'run'} is a run of {hint}", error)


def test_widths_in_another_order_resume_the_same_run(model_folder, run, tmp_path, capsys):
    """A run of kdmd, also of a version that recorded the widths as they were given."""
    (tmp_path / "prompts.txt").write_text("a red car\na cat\n")

    def distill(name, steps, *widths):
        given = ["--model", model_folder, "--run-dir", tmp_path / name, "--batch-size", 1]
        given += ["--prompts-file", tmp_path / "prompts.txt", "--rank", 1, "--student-every", 1]
        given += ["--validation-prompts", "a car", "--few-steps", 1, "--steps", steps]
        output = tmp_path / f"{name}-{steps}.safetensors"
        run(kdmd, *given, "--output", output, "--model-widths", *widths)

    distill("whole", 4, "full", "tiny")
    distill("cut", 2, "tiny", "full")
    record = tmp_path / "cut" / "settings.json"
    values = json.loads(record.read_text())
    assert values["options"]["model_widths"] == ["full", "tiny"]
    values["options"]["model_widths"].reverse()
    record.write_text(json.dumps(values))
    distill("cut", 4, "full", "tiny")
    files = [tmp_path / name / "step_4" / "model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_few_step_teachers_and_prompts_that_change_when_a_run_is_resumed(
    model_folder, run, fails, tmp_path, capsys
):
    def options(name, prompts, *more):
        (tmp_path / "prompts.txt").write_text(prompts)
        given = ["--model", model_folder, "--run-dir", tmp_path / name, "--batch-size", 1]
        given += ["--model-widths", "tiny", "--rank", 1, "--student-every", 1]
        given += ["--prompts-file", tmp_path / "prompts.txt"]
        return [*given, "--validation-prompts", "a car", "--few-steps", 1, *more]

    lora = tmp_path / "teacher.safetensors"
    run(kdmd, *options("a", "a car", "--steps", 1, "--output", lora))
    last = ["--steps", 2, "--output", tmp_path / "b.safetensors"]
    message = "a run with other few-step LoRA:"
    assert message in fails(kdmd, *options("a", "a car", *last, "--few-step-lora", lora))
    width = "the few-step mode of {} was trained at model width tiny, not at full"
    monkey = ["--few-step-lora", lora, *last[:2], "--output", tmp_path / "c.safetensors"]
    run(kdmd, *options("c", "a car", *monkey))
    assert width.format(lora) in capsys.readouterr().err
    wide = fails(kdmd, *options("a", "a car", *last, "--model-widths", "tiny", "small"))
    assert wide == (
        f"{tmp_path / 'a'} was trained with --model-widths tiny, not with --model-widths small "
        "tiny: give --model-widths tiny to resume it, or another --run-dir"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kdmd, "load_pretrained", lambda folder: pytest.fail("the model is loaded"))
        rank = fails(kdmd, *options("a", "a car", *last, "--rank", 2))
    assert "was trained with --rank 1, not with --rank 2: give --rank 1 to resume" in rank
    assert "a run with other prompts:" in fails(kdmd, *options("a", "a cat", *last))
    error = fails(kdmd, *options("a", "a car", *last, "--batch-size", 2))
    assert "step_1 was trained with --batch-size 1, not 2: give 1, or another run folder" in error
    capsys.readouterr()
    more = ["--guidance", 2, "--sizes", "32x64", "64x64", "--learning-rate", 1e-5]
    run(kdmd, *options("a", "a car", *last, *more))
    said = capsys.readouterr().err.splitlines()
    guidance = ModelFolder.open(model_folder).config.sampler.guidance_scale
    first = f"--guidance {guidance} -> 2.0, --sizes not given -> 32x64 64x64"
    assert f"resuming with other settings: {first}" in said
    assert "resuming with other settings: --steps 1 -> 2, --learning-rate 0.0001 -> 1e-05" in said
    error = fails(export, "--run", tmp_path / "a", "--output", tmp_path / "model")
    assert (
        "a is a run of train.kdmd: give train.export a --model, and with --few-step-lora" in error
    )
