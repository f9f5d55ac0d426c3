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
from mlx_snapgen.teachers import folder as folders
from mlx_snapgen.teachers.config import LIGHTNING
from mlx_snapgen.teachers.folder import load_flow_teacher
from tests.runtime.test_teacher import QWEN, lightning
from tests.tiny_teachers import Reader, write_teacher


@pytest.fixture(autouse=True)
def no_language_model(monkeypatch):
    monkeypatch.setattr(folders, "load_qwen", lambda *_, **__: Reader())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("teacher") / "teacher"
    write_teacher(made, dataclasses.replace(QWEN, few_step=LIGHTNING))
    (made / "text_encoder").mkdir()
    network = folders.load_network(made, folders.load_teacher_config(made))
    lightning(made / "few_step.safetensors", network)
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
    levels = sample_teacher.noise_levels(QWEN.schedule, 6, num_inference_steps=2)
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


def test_mistakes_are_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="must be multiples of 16"):
        sample_teacher.main(
            [str(folder), "x", "--output", str(tmp_path / "x.png"), "--height", "40"]
        )
    with pytest.raises(UserError, match="a name ending in"):
        draw(folder, tmp_path / "x.jpg")
    with pytest.raises(UserError, match=r"is not a teacher: no teacher.json"):
        draw(tmp_path, tmp_path / "x.png")
    plain = write_teacher(tmp_path / "plain", QWEN)
    (plain / "text_encoder").mkdir()
    with pytest.raises(UserError, match="no few-step mode"):
        draw(plain, tmp_path / "x.png", "--few-step")
