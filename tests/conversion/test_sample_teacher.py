"""Drawing with a teacher from the command line, on tiny random weights."""

import dataclasses
import itertools

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from convert import sample_teacher
from mlx_snapgen.errors import UserError
from mlx_snapgen.sampling import get_noise
from mlx_snapgen.teachers.config import LIGHTNING
from mlx_snapgen.teachers.flow import shifted_levels
from mlx_snapgen.teachers.folder import load_flow_teacher, load_network
from tests.tiny import TEACHER, write_lightning_lora, write_teacher

pytestmark = pytest.mark.usefixtures("no_language_model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = dataclasses.replace(TEACHER, few_step=LIGHTNING)
    made = write_teacher(tmp_path_factory.mktemp("teacher") / "teacher", config)
    write_lightning_lora(made / "few_step.safetensors", load_network(made, config))
    return made


def draw(folder, path, *options):
    size = ["--height", "32", "--width", "48", "--seed", "5"]
    sample_teacher.main([str(folder), "a red car", "--output", str(path), *size, *options])
    with Image.open(path) as picture:
        return np.array(picture)


def test_many_steps_follow_the_guided_velocity(folder, tmp_path, capsys):
    drawn = draw(folder, tmp_path / "a.png", "--steps", "2", "--guidance", "3")
    assert str(tmp_path / "a.png") in capsys.readouterr().out
    teacher, autoencoder = load_flow_teacher(folder)
    condition = teacher.encode(["a red car"])
    levels = shifted_levels(TEACHER.schedule, 2, time_shift=TEACHER.schedule.time_shift(6, 2))
    x = get_noise(5, 4, 6, 4)
    for here, there in itertools.pairwise(levels):
        x = x + (there - here) * teacher.velocity(
            x, mx.array([here]), condition, guidance_scale=3.0
        )
    expected = np.clip(np.array(autoencoder.decode(x))[0], -1, 1) * 127.5 + 127.5
    assert drawn.shape == (32, 48, 3)
    np.testing.assert_allclose(drawn, expected, atol=0.51)


def test_few_steps_draw_another_picture_without_guidance(folder, tmp_path):
    few = draw(folder, tmp_path / "few.png", "--few-step", "--steps", "2")
    many = draw(folder, tmp_path / "many.png", "--steps", "2", "--guidance", "1")
    assert few.shape == many.shape and np.abs(few.astype(int) - many).max() > 3
    with pytest.raises(UserError, match="few-step mode has no guidance"):
        draw(folder, tmp_path / "x.png", "--few-step", "--guidance", "4")


def test_a_prompt_that_is_cut_is_noted(folder, tmp_path, capsys):
    rest = ["--height", "32", "--width", "32", "--steps", "1", "--output"]
    prompt = "cat " * 300
    sample_teacher.main([str(folder), prompt, *rest, str(tmp_path / "a.png")])
    assert "note: the prompt is longer than" in capsys.readouterr().err
    sample_teacher.main([str(folder), "a cat", *rest, str(tmp_path / "b.png")])
    assert "longer than" not in capsys.readouterr().err


def test_mistakes_are_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="must be multiples of 16"):
        sample_teacher.main(
            [str(folder), "x", "--output", str(tmp_path / "x.png"), "--height", "40"]
        )
    with pytest.raises(UserError, match="a name ending in"):
        draw(folder, tmp_path / "x.jpg")
    with pytest.raises(UserError, match=r"is not a teacher: no teacher.json"):
        draw(tmp_path, tmp_path / "x.png")
    plain = write_teacher(tmp_path / "plain")
    with pytest.raises(UserError, match="no few-step mode"):
        draw(plain, tmp_path / "x.png", "--few-step")
