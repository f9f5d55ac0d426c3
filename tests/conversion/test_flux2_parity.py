"""FLUX.2 klein and klein base against diffusers' pipeline, from prompt to picture."""

import dataclasses
import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import convert.teacher
from convert import sample_teacher
from convert.parity.originals import flux2_klein_pipeline, relative_difference
from convert.parity.pictures import SETTINGS, drawn, make
from mlx_snapgen.checkpoint.language_models import load_qwen
from mlx_snapgen.errors import UserError
from mlx_snapgen.fitting import fit_reference
from mlx_snapgen.networks.layers import pack, unpack
from mlx_snapgen.networks.text_encoders.qwen import FLUX2_KLEIN
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.public.convert import convert as convert_part
from mlx_snapgen.public.source import find_source
from mlx_snapgen.public.teachers import TeacherParts, convert_teacher
from mlx_snapgen.sampling import denoise, get_noise
from mlx_snapgen.teachers import config as teacher_config
from mlx_snapgen.teachers.config import KLEIN, KLEIN_BASE
from mlx_snapgen.teachers.flow import FlowTeacher, shifted_levels
from mlx_snapgen.teachers.folder import load_flow_teacher
from tests.tiny import require

require("mlx_lm", "torch", "diffusers", "transformers")

PROMPTS = ["a red car", "two cats: \u00e4, {} and <|im_end|>, on a table that is green"]
WORDS = "a bird and a dog on a hill with many small trees " * 12


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    """(klein base's pipeline, klein's, a folder with both in diffusers' format)."""
    folder = tmp_path_factory.mktemp("klein")
    pipelines = [flux2_klein_pipeline(is_distilled=is_distilled) for is_distilled in (False, True)]
    for p in pipelines[1].transformer.parameters():
        p.mul_(1.1)
    make(folder, base=pipelines[0], klein=pipelines[1])
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    return *pipelines, folder


@pytest.fixture(scope="module")
def both(klein):
    """(teacher with klein as its few-step mode, its autoencoder)."""
    folder = klein[-1]
    convert_teacher(folder / "base", folder / "both", TeacherParts(few_step_model=folder / "klein"))
    return load_flow_teacher(folder / "both")


def test_the_prompts_are_read_as_the_pipeline_reads_them(klein, both):
    """The padding counts, and a long prompt is cut at 512 tokens."""
    import torch

    prompts = [*PROMPTS, "", WORDS]
    with torch.no_grad():
        expected, _ = klein[0].encode_prompt(prompts)
    condition = both[0].encode(prompts)
    assert condition.text.shape == (4, 512, 96) and condition.mask.all()
    assert relative_difference(condition.text, expected) < 1e-4
    assert relative_difference(condition.empty_text[0], expected[2]) < 1e-4


def test_a_language_model_must_have_the_layers(klein, tmp_path):
    text_encoder = klein[-1] / "both" / "text_encoder"
    longer = FLUX2_KLEIN._replace(joined_layers=(9, 28))
    with pytest.raises(UserError, match="has 28 layers, this teacher's text encoder has more"):
        load_qwen(text_encoder, longer, dims=64)
    with pytest.raises(UserError, match="gives states of 96, the teacher takes those of 7680"):
        load_qwen(text_encoder, FLUX2_KLEIN, dims=7680)


@pytest.mark.parametrize(
    ("guidance", "steps", "size", "count"),
    [(4.0, 3, (48, 80), 0), (1.5, 2, (16, 112), 1), (1.0, 4, (64, 32), 0), (3.0, 2, (32, 48), 2)],
)
def test_pictures_are_those_of_the_pipeline(klein, both, guidance, steps, size, count):
    pipe = SnapGenPipeline.from_pretrained(klein[-1] / "both")
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "few_step": False}
    settings |= {"edit": tuple(str(klein[-1] / f"{k + 1}.png") for k in range(count))}
    settings |= {"prompt": [WORDS, *PROMPTS][count], "height": size[0], "width": size[1]}
    found, expected = drawn(pipe, klein[0], SETTINGS, **settings)
    assert relative_difference(found, expected) < 1e-4


def test_pictures_of_a_batch_are_those_of_the_pipeline(klein, both):
    """Two prompts of different length, which are padded, and a picture to edit."""
    import torch

    teacher, autoencoder = both
    height, width, steps, prompts = 48, 80, 3, [PROMPTS[0], WORDS]
    channels = 4 * teacher.config.transformer.latent_channels
    noise = np.random.default_rng(1).normal(size=(2, 3, 5, channels)).astype(np.float32)
    picture = Image.open(klein[-1] / "1.png")
    expected = klein[0](
        prompt=prompts,
        image=[picture],
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=4.0,
        latents=torch.tensor(noise).permute(0, 3, 1, 2),
        output_type="pt",
    ).images
    given = [autoencoder.encode(from_uint8(np.array(fit_reference(picture, unit=16))[None]))]
    condition = teacher.encode(prompts)
    shift = teacher.config.schedule.time_shift(15, steps)

    def velocity(x_t, sigma):
        t = mx.full((2,), sigma)
        return teacher.velocity(x_t, t, condition, guidance_scale=4.0, references=given)

    start = unpack(mx.array(noise.reshape(2, -1, channels)), (3, 5), patch=2)
    levels = shifted_levels(teacher.config.schedule, steps, time_shift=shift)
    *_, last = denoise(velocity, start, levels)
    found = mx.clip(autoencoder.decode(last.x_t) / 2 + 0.5, 0, 1)
    assert relative_difference(found, expected.permute(0, 2, 3, 1)) < 1e-4


def test_the_few_step_mode_is_klein(klein, both):
    """Two sets of weights behind one interface: the velocities of each are those of its model."""
    teacher, _ = both
    assert teacher.has_few_step and teacher.config.few_step == few_step_of(KLEIN)
    convert_teacher(klein[-1] / "klein", klein[-1] / "alone")
    alone, _ = load_flow_teacher(klein[-1] / "alone")
    assert alone.config.schedule == alone.config.few_step == teacher.config.few_step
    assert alone.few_step_network is None
    condition, t = teacher.encode(PROMPTS), mx.array([0.3, 0.9])
    x_t = mx.random.normal((2, 4, 6, 4), key=mx.random.key(0))
    given = mx.random.normal((1, 2, 4, 4), key=mx.random.key(1))
    few = teacher.velocity_and_features(x_t, t, condition, few_step=True, references=[given])
    expected = alone.velocity_and_features(x_t, t, condition, few_step=True, references=[given])
    assert all(map(mx.array_equal, few, expected))
    many, _ = teacher.velocity_and_features(x_t, t, condition, references=[given])
    assert mx.array_equal(many, teacher.velocity(x_t, t, condition, references=[given]))
    assert relative_difference(few[0], many) > 0.01
    assert few[1].shape == (2, 6, teacher.feature_dims)


def few_step_of(schedule):
    """With the numbers of scheduler_config.json, which klein does not use."""
    return dataclasses.replace(schedule, log_shifts=(0.5, 1.15), tokens=(256, 4096))


def test_klein_base_alone_has_no_few_step_mode(klein, tmp_path):
    convert_teacher(
        klein[-1] / "base", tmp_path / "base", TeacherParts(text_encoder="owner/reader")
    )
    values = teacher_config.teacher_config(
        {k: v for k, v in json_of(tmp_path / "base").items() if k != "format_version"}
    )
    assert values.schedule == few_step_of(KLEIN_BASE) and values.few_step is None


def json_of(folder):
    return json.loads((folder / "teacher.json").read_text())


def test_a_wrong_schedule_is_noticed(klein, both, monkeypatch):
    plain = teacher_config.empirical_log_shift
    wrong = lambda tokens, steps: plain(tokens, steps) + 0.01  # noqa: E731
    monkeypatch.setattr(teacher_config, "empirical_log_shift", wrong)
    pipe = SnapGenPipeline.from_pretrained(klein[-1] / "both")
    found, expected = drawn(pipe, klein[0], SETTINGS, guidance_scale=1.0, few_step=False)
    assert relative_difference(found, expected) > 1e-3


@pytest.mark.parametrize(("tokens", "steps"), [(64, 1), (1024, 4), (4096, 50), (4301, 28)])
def test_the_time_shift_is_diffusers(tokens, steps):
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    expected = np.exp(compute_empirical_mu(tokens, steps))
    assert KLEIN.time_shift(tokens, steps) == pytest.approx(expected, rel=1e-7)


def test_commands_from_public_folders_to_an_edited_picture(klein, tmp_path, monkeypatch):
    """convert.teacher with klein as few-step mode, then convert.sample_teacher --edit."""
    import torch

    _, pipeline, folder = klein
    teacher, path = tmp_path / "teacher", tmp_path / "picture.png"
    few_step = ["--few-step-model", str(folder / "klein")]
    arguments = ["teacher", str(folder / "base"), str(teacher), *few_step]
    monkeypatch.setattr(sys, "argv", arguments)
    convert.teacher.main()
    picture = Image.open(folder / "1.png")
    options = ["--few-step", "--steps", "2", "--seed", "7", "--edit", str(folder / "1.png")]
    sample_teacher.main([str(teacher), "a red car", "--output", str(path), *options])
    width, height = 64, 80
    noise = pack(get_noise(7, height // 8, width // 8, 4), 2).reshape(1, 5, 4, 16)
    expected = pipeline(
        prompt="a red car",
        image=picture,
        num_inference_steps=2,
        latents=torch.tensor(np.array(noise)).permute(0, 3, 1, 2),
        output_type="np",
    ).images[0]
    with Image.open(path) as found:
        assert found.size == (width, height)
        difference = np.abs(np.array(found) - 255 * expected)
    assert difference.max() < 0.6
    assert 255 * expected.std() > 20


def test_packed_networks_of_both_modes(klein, tmp_path):
    """Converted before, and with the teacher: the same files."""
    how = {"bits": 8, "group_size": 32}
    for name in ("base", "klein"):
        source = find_source(str(klein[-1] / name / "transformer"))
        convert_part(source, tmp_path / name, quantization=how)
    convert_teacher(
        klein[-1] / "base",
        tmp_path / "a",
        TeacherParts(few_step_model=klein[-1] / "klein", text_encoder="owner/reader"),
        quantization=how,
    )
    convert_teacher(
        klein[-1] / "base",
        tmp_path / "b",
        TeacherParts(
            transformer=tmp_path / "base",
            few_step_model=tmp_path / "klein",
            text_encoder="owner/reader",
        ),
    )
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {p.name for p in (tmp_path / "b").iterdir()}
    assert "few_step-00001.safetensors" in names
    for name in (n for n in names if n.endswith(".safetensors")):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    with pytest.raises(UserError, match="convert both alike"):
        convert_teacher(
            klein[-1] / "base",
            tmp_path / "c",
            TeacherParts(few_step_model=tmp_path / "klein", text_encoder="owner/reader"),
        )
    with pytest.raises(UserError, match="a LoRA or a model for the few-step mode, not both"):
        convert_teacher(
            klein[-1] / "base",
            tmp_path / "c",
            TeacherParts(
                few_step_lora=tmp_path / "x.safetensors", few_step_model=tmp_path / "klein"
            ),
        )
    assert not (tmp_path / "c").exists()


def test_klein_has_no_guidance(klein, both):
    config = dataclasses.replace(both[0].config, schedule=both[0].config.few_step)
    teacher = FlowTeacher(config, both[0].network, prompts=None)
    with pytest.raises(UserError, match=r"FLUX\.2 klein has no guidance, only klein base"):
        sample_teacher.sample(teacher, both[1], prompt="a", guidance_scale=4.0)


@pytest.mark.parametrize("size", [(1500, 1111), (700, 2000), (64, 500), (200, 81)])
def test_pictures_to_edit_are_fitted_as_in_the_pipeline(size):
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    expected = processor._resize_if_exceeds_area(picture)
    width, height = (side // 16 * 16 for side in expected.size)
    expected = processor.preprocess(expected, height=height, width=width, resize_mode="crop")
    found = fit_reference(picture, unit=16)
    expected = (expected[0].permute(1, 2, 0).numpy() + 1) * 127.5
    np.testing.assert_allclose(np.array(found), expected, atol=1e-3)


@pytest.mark.parametrize("size", [(63, 200), (64, 513)])
def test_pictures_that_cannot_be_edited_are_one_line(size):
    with pytest.raises(UserError, match="cannot be edited: both sides must be at least 64"):
        fit_reference(Image.new("RGB", size), unit=16)


def test_only_klein_edits(klein, both):
    teacher = FlowTeacher(
        dataclasses.replace(both[0].config, kind="z-image"), both[0].network, prompts=None
    )
    picture = Image.open(klein[-1] / "1.png")
    with pytest.raises(UserError, match="cannot edit pictures: leave out --edit"):
        sample_teacher.sample(teacher, both[1], prompt="a", references=[picture])
