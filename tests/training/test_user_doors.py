"""Mistakes of users of the training commands."""

import argparse
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
from train import export, flow
from train.data.preparation import PictureSet, Reader
from train.data.readers.folder import PictureFolderRecords
from train.data.selection import Filter
from train.loop.teacher import check_teacher_latents
from train.options.common import widths_of


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


def test_a_run_is_no_model(tmp_path):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a run folder: python -m train\.export --run .* first"):
        ModelFolder.open(tmp_path)


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
        check_teacher_latents(None, None, teacher="big", model="new")


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
