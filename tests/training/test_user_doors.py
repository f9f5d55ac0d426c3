"""Mistakes of users of the training commands."""

import argparse
import json
import shutil
from types import SimpleNamespace

import pytest

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import add_lora
from mlx_snapgen.lora.files import few_step_sampler, save_lora
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.open_model import open_model
from mlx_snapgen.settings import ModelChoice
from tests.training.test_prepare import write_pictures
from train import autoencoder, export, flow, new, prepare
from train.data.prepared import Prepared
from train.data.readers.folder import PictureFolderRecords
from train.data.selection import HELD_OUT, Filter
from train.data.stickers.source import Stickers
from train.loop.teacher import check_teacher_latents
from train.options.common import widths_of
from train.options.prepare import parse
from train.preparation.pictures import PictureSet, Reader
from train.setup.data import data_from


def test_a_lora_of_a_style_is_no_few_step_mode(model_folder, tmp_path):
    network = load_pretrained(model_folder).transformer
    add_lora(network, 2, alpha=2.0, targets=["self_attention.*_proj"], name="default")
    save_lora(tmp_path / "style.safetensors", network, name="default")
    with pytest.raises(UserError, match=r"not a few-step LoRA of train\.kdmd: .* generate --lora"):
        few_step_sampler(tmp_path / "style.safetensors")


def test_widths_have_the_order_of_the_model(model_folder):
    config = ModelFolder.open(model_folder).config
    given = argparse.Namespace(model_widths=["tiny", "full", "small"])
    assert [width.name for width in widths_of(given, config)] == ["full", "small", "tiny"]


def test_a_model_folder_is_no_run(model_folder, run, tmp_path):
    with pytest.raises(UserError, match="is a model folder, not a run: give it with --model"):
        run(export, "--run", model_folder, "--output", tmp_path / "made")


@pytest.mark.parametrize(
    ("record", "instead"),
    [
        ({}, r"run folder: python -m train\.export --run .*made first"),
        (
            {"mask_ratio": 0.5, "model": "m", "autoencoder": {}},
            r"run folder: .* --run .*made first",
        ),
        ({"options": {"teacher_digest": "a"}}, r"run folder: .*train\.export --run .*made first"),
        ({"autoencoder": {}}, r"run of train\.autoencoder: give it to train\.new --autoencoder"),
        (
            {"few_step": {}},
            r"run of train\.kdmd: give train\.export .* the LoRA file that it wrote",
        ),
        ({"rank": 4}, r"run of train\.lora: draw with the LoRA file .* generate --lora FILE"),
        ({"average_bits": 5}, r"run of train\.palettes: its model is the folder of its --output"),
    ],
)
def test_a_run_is_no_model(record, instead, run, tmp_path):
    """Each kind of run has its own way to a model, at every place where a model is taken."""
    made = tmp_path / "made"
    (made / "step_1").mkdir(parents=True)
    (made / "settings.json").write_text(json.dumps(record))
    line = f"made is a {instead}$"
    for opened in (ModelFolder.open, lambda folder: open_model(ModelChoice(str(folder)))):
        with pytest.raises(UserError, match=line):
            opened(made)
    with pytest.raises(UserError, match=line):
        run(flow, "--model", made, "--data", "stickers", "--run-dir", tmp_path / "new")
    given = ["--preset", "tiny", "--autoencoder", "a", "--text-encoder", "b"]
    with pytest.raises(UserError, match=line):
        run(new, tmp_path / "out", *given, "--weights-from", made)


def test_core_ml_packages_are_no_model(model_folder, tmp_path):
    """Also those whose config.json is a model's."""
    package = tmp_path / "exported" / "Transformer.mlpackage"
    package.mkdir(parents=True)
    for name in (package.parent, package):
        with pytest.raises(UserError, match=r"holds Core ML packages, .* the model that convert"):
            open_model(ModelChoice(str(name)))
        shutil.copy(model_folder / "config.json", package.parent)
    whole = tmp_path / "whole"
    shutil.copytree(model_folder, whole)
    (whole / "Transformer.mlpackage").mkdir()
    assert open_model(ModelChoice(str(whole))).path == whole


def test_a_teacher_with_other_latents_is_named():
    with pytest.raises(UserError, match=r"SOURCE --model new --teacher big --output FOLDER, and"):
        check_teacher_latents(Stickers(), None, teacher="big", model="new")


@pytest.mark.parametrize(
    ("name", "hint"), [("a.tar", r": give '.*/\*\.tar'$"), ("a.png", "or give --caption-template$")]
)
def test_a_folder_without_captioned_pictures(name, hint, tmp_path):
    (tmp_path / name).touch()
    work = PictureSet(
        PictureFolderRecords(tmp_path),
        Reader([], Filter(), columns=["caption"], named=False),
        encoder=SimpleNamespace(batch_size=1, autoencoder=None),
        chunk_size=1,
        workers=1,
    )
    with pytest.raises(UserError, match=hint):
        work.measure(0)


def test_more_sub_networks_than_widths_are_refused(model_folder, run, tmp_path):
    (tmp_path / "a.png").touch()
    own = ["--model", model_folder, "--data", tmp_path, "--run-dir", tmp_path.parent / "run"]
    with pytest.raises(UserError, match="--sub-networks 3: --model-widths has only 2"):
        run(flow, *own, "--sub-networks", 3)


def test_untrained_weights_are_told_when_they_are_exported(model_folder, run, tmp_path, capsys):
    config = ModelFolder.open(model_folder).config
    components = load_pretrained(model_folder)
    components.transformer = EfficientDiT(config.transformer)
    save_pretrained(tmp_path / "new", components)
    run(export, "--model", tmp_path / "new", "--output", tmp_path / "made")
    assert "is not trained yet: the exported model draws noise" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["config.json", "model_index.json"])
def test_a_model_of_diffusers_is_converted_first(file, run, tmp_path):
    """By the commands that take the folder of an autoencoder."""
    public = tmp_path / "klein"
    public.mkdir()
    (public / file).write_text('{"_class_name": "AutoencoderKL"}')
    line = r"klein is in the format of diffusers: .* convert\.from_torch .*klein --output OUT"
    with pytest.raises(UserError, match=line):
        run(prepare, tmp_path, "--model", public, "--output", tmp_path.parent / "set")
    given = ["--data", "stickers", "--run-dir", tmp_path / "run", "--init-from", public]
    with pytest.raises(UserError, match=line):
        run(autoencoder, *given, "--decoder-only")
    if file == "model_index.json":
        with pytest.raises(UserError, match="klein is a folder in diffusers' format, not of a run"):
            run(export, "--run", public, "--output", tmp_path / "made")


def test_few_pictures_keep_none_for_validation_and_a_line_tells_it(
    model_folder, run, monkeypatch, tmp_path, capsys
):
    line = "note: sets of fewer than 100 pictures keep none for validation: --held-out 0.2 is not"
    pictures = write_pictures(tmp_path / "set", 2)
    given = ["--model", model_folder, "--resolution", 64, "--output", tmp_path / "made"]
    parsed = ["prepare", str(pictures), "--model", "m", "--output", str(tmp_path / "other")]
    monkeypatch.setattr("sys.argv", parsed)
    args = parse()
    args.data, args.weights, args.resolution = [str(pictures)], None, 64
    for share, said in ((0.2, True), (HELD_OUT, False), (0.0, False)):
        args.held_out = share
        assert data_from(args, size=(64, 64), unit=32, seed=0).validation() is None
        assert (line in capsys.readouterr().err) == said
    run(prepare, pictures, *given, "--held-out", 0.2)
    assert capsys.readouterr().err.count(line) == 1
    assert Prepared(tmp_path / "made").validation() is None


def test_a_folder_of_runs_names_the_run_to_give(run, tmp_path):
    runs = tmp_path / "runs"
    for name, record in (("b-flow", {"mask_ratio": 0}), ("a-kd", {"teacher_digest": "a"})):
        (runs / name / "step_1").mkdir(parents=True)
        (runs / name / "settings.json").write_text(json.dumps(record))
        (runs / name / "sample.png").touch()
    given = ["--preset", "tiny", "--autoencoder", runs, "--text-encoder", "b"]
    both = rf"runs holds run folders: give one of them, {runs}/a-kd, {runs}/b-flow$"
    with pytest.raises(UserError, match=both):
        run(new, tmp_path / "out", *given)
    with pytest.raises(UserError, match=both):
        run(export, "--run", runs, "--output", tmp_path / "out")
    (runs / "c" / "step_1").mkdir(parents=True)
    (runs / "c" / "settings.json").write_text('{"autoencoder": {}}')
    with pytest.raises(UserError, match=rf"runs holds run folders: give {runs}/c$"):
        run(new, tmp_path / "out", *given)
    with pytest.raises(UserError, match=rf"runs holds run folders: give {runs}/c$"):
        run(prepare, tmp_path, "--model", runs, "--output", tmp_path.parent / "set")


def test_export_names_its_own_options(model_folder, run, tmp_path):
    made = ["--output", tmp_path / "made"]
    with pytest.raises(UserError, match=r"^no run folder nosuch$"):
        run(export, "--run", "nosuch", *made)
    with pytest.raises(
        UserError, match="--resolution 60: give a multiple of 32 pixels, such as 32 or"
    ):
        run(export, "--model", model_folder, "--resolution", 60, *made)
