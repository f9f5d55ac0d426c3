"""Distillation on prepared data: text states and latents of both models, commands end to end."""

import dataclasses
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.config import SamplerConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.files import few_step_sampler
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.teachers.base import Condition
from mlx_snapgen.teachers.checkpoint import load_teacher
from mlx_snapgen.teachers.flow import FlowTeacher
from tests.tiny import STUDENT, make_components, randomize, write_teacher
from tests.training.test_prepare import write_pictures
from train import export, kd, kdmd, prepare
from train.data.conditions import Conditions
from train.data.prepared import Prepared
from train.data.source import TEACHER
from train.loop.checkpoint import latest_checkpoint
from train.loop.teacher import conditions_for, same_latents

pytestmark = pytest.mark.usefixtures("no_language_model", "quick")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set", 14)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A model with latents of its own."""
    folder = tmp_path_factory.mktemp("student") / "student"
    sampler = SamplerConfig(num_inference_steps=2)
    components = make_components(dataclasses.replace(STUDENT, sampler=sampler))
    randomize(components.autoencoder, 77)
    save_pretrained(folder, components)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "qwen")


@pytest.fixture
def prepared(run, pictures, student, teacher, tmp_path):
    made = tmp_path / "data"
    options = ["--model", student, "--teacher", teacher, "--resolution", 64, "--output", made]
    run(prepare, pictures, *options)
    return made


COMMON = ("--steps", 2, "--batch-size", 2, "--validation-prompts", "a cat", "--resolution", 64)


def test_kd_on_data_of_both_models(run, prepared, pictures, student, teacher, tmp_path, capsys):
    """The teacher's text encoder only encodes what the check needs, then it is freed."""
    asked, encode = [], FlowTeacher.encode

    def counted(self, prompts):
        asked.extend(prompts)
        return encode(self, prompts)

    common = ["--model", student, "--teacher", teacher, *COMMON, "--accumulate", 2]
    common += ["--checkpoint-every", 1, "--save-memory", "--run-dir", tmp_path / "run"]
    common += ["--guidance", 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowTeacher, "encode", counted)
        run(kd, *common, "--data", prepared)
    assert len(asked) == 2 and asked[0] == ""
    assert latest_checkpoint(tmp_path / "run").name == "step_2"
    trained = mx.load(str(latest_checkpoint(tmp_path / "run") / "model.safetensors"))
    assert trained["projectors.0.weight"].shape == (32, 32)
    # Pictures that are not prepared have no latents of the teacher.
    with pytest.raises(UserError, match="has other latents than the model: encode") as error:
        run(kd, *common, "--data", pictures)
    assert "\n" not in str(error.value)
    err = capsys.readouterr().err
    assert "other teacher" not in err
    assert f"warning: --guidance has no effect: {teacher} has other latents" in err
    made = tmp_path / "model"
    run(export, "--run", tmp_path / "run", "--output", made)
    assert load_pretrained(made).config.transformer.widths == (1.0, 0.5, 0.375)


def test_states_of_another_teacher_are_not_used(prepared, model_folder, teacher, capsys):
    data, (public, autoencoder) = Prepared(prepared), load_teacher(teacher)
    assert not same_latents(autoencoder, load_pretrained(model_folder).autoencoder)
    own = conditions_for(public, data, name="qwen")
    assert own.stored and public.prompts is None
    samples = data.samples(0, 3)
    found = own(samples.captions, samples.states)
    expected = load_teacher(teacher)[0].encode(samples.captions)
    for k in range(3):
        wanted = np.array(expected.text[k])[np.array(expected.mask[k])]
        np.testing.assert_allclose(
            np.array(found.text[k])[np.array(found.mask[k])], wanted, atol=2e-3
        )
    other = conditions_for(load_teacher(model_folder)[0], data, name="random")
    assert not other.stored
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "has text states of another teacher than random" in err


def test_states_of_a_teacher_in_bfloat16_are_found_again():
    """As of teachers on a GPU."""
    states = mx.random.normal((1, 3, 4), key=mx.random.key(0)).astype(mx.bfloat16)
    known = Condition(states, mx.ones((1, 3), mx.bool_), states, mx.ones((1, 3), mx.bool_))
    conditions = Conditions(SimpleNamespace(encode=lambda prompts: known))
    rounded = np.array(states[0].astype(mx.float32))
    for found, is_same in ((rounded, True), (-rounded, False), (rounded[:2], False)):
        samples = SimpleNamespace(states={TEACHER: [found]}, captions=["a cat"])
        assert conditions.same_states(samples) == is_same


def test_kdmd_on_prepared_captions_and_sizes(run, prepared, student, tmp_path):
    """From data to a model that draws with the student's own steps."""
    data = Prepared(prepared)
    assert len({data.samples(k, 2).latents.shape for k in range(8)}) > 1
    common = ["--model", student, *COMMON, "--rank", 2, "--student-every", 2, "--accumulate", 2]
    common += ["--checkpoint-every", 1, "--run-dir", tmp_path / "run"]
    lora = tmp_path / "few.safetensors"
    run(kdmd, *common, "--data", prepared, "--few-steps", 2, "--output", lora)
    assert few_step_sampler(lora).num_inference_steps == 2
    assert latest_checkpoint(tmp_path / "run").name == "step_2"
    made = tmp_path / "model"
    run(export, "--model", student, "--few-step-lora", lora, "--output", made)
    assert ModelFolder.open(made).config.few_step == few_step_sampler(lora)
    picture, *_ = SnapGenPipeline.from_pretrained(made)("a cat", height=64, width=64, seed=1)
    assert picture.size == (64, 64)
