"""The lists of GenEval and DPG-Bench, in the layouts that their scorers read."""

import json
import os
import re

import mlx_snapgen  # noqa: F401

# isort: split
import numpy as np
import pytest
from PIL import Image

from mlx_snapgen.draw import draw_pictures
from mlx_snapgen.errors import UserError
from mlx_snapgen.settings import DrawSettings
from train.evaluation import prompt_lists
from train.evaluation.models import OwnModel
from train.evaluation.prompt_lists import claim_folder, dpg_files, draw_files, geneval_files

SETTINGS = DrawSettings(num_inference_steps=1, guidance_scale=1.0)
LINES = [
    {
        "tag": "single_object",
        "include": [{"class": "apple", "count": 1}],
        "prompt": "a photo of an apple",
    },
    {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
        "prompt": "a photo of two cats",
    },
]


@pytest.fixture
def metadata(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + "\n")
    return path


@pytest.fixture
def prompts(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "1.txt").write_text("a red apple\n")
    (folder / "COCOval2014000000000042.txt").write_text("a cat\n  and a car \n")
    return folder


def geneval_scorer(folder):
    """What evaluate_images.py of GenEval goes through: (metadata, pictures) of each prompt."""
    found = []
    for subfolder in sorted(os.listdir(folder)):
        path = folder / subfolder
        if not path.is_dir() or not subfolder.isdigit():
            continue
        with open(path / "metadata.jsonl") as file:
            values = json.load(file)
        names = [n for n in os.listdir(path / "samples") if re.match(r"\d+\.png", n)]
        found.append((values, [Image.open(path / "samples" / n) for n in sorted(names)]))
    return found


def test_geneval_is_what_its_scorer_reads(components, metadata, tmp_path):
    listed = geneval_files(metadata, per_prompt=3, seed=5)
    output = tmp_path / "out"
    claim_folder(output, {"model": "m"})
    assert (
        draw_files(OwnModel(components), listed, output=output, settings=SETTINGS, batch_size=4)
        == 6
    )
    found = geneval_scorer(output)
    assert [values for values, _ in found] == LINES
    for values, pictures in found:
        prompt = values["prompt"]
        expected = draw_pictures(components, [prompt] * 3, seeds=[5, 6, 7], settings=SETTINGS)
        for picture, right in zip(pictures, expected, strict=True):
            assert np.abs(np.asarray(picture).astype(int) - right).max() <= 1
    assert sorted(os.listdir(output / "00001" / "samples")) == ["0000.png", "0001.png", "0002.png"]
    assert set(os.listdir(output)) == {"00000", "00001", "settings.json"}


def test_dpg_is_what_its_scorer_reads(components, prompts, tmp_path):
    """The scorer cuts four squares out of a file and takes its name up to the first dot as key."""
    listed = dpg_files(prompts, seed=2)
    settings = DrawSettings(height=32, width=32, num_inference_steps=1, guidance_scale=1.0)
    output = tmp_path / "out"
    assert (
        draw_files(OwnModel(components), listed, output=output, settings=settings, batch_size=3)
        == 2
    )
    names = os.listdir(output / "images")
    assert {name.split(".")[0] for name in names} == {"1", "COCOval2014000000000042"}
    texts = {"1.png": "a red apple", "COCOval2014000000000042.png": "a cat and a car"}
    for name in names:
        grid = Image.open(output / "images" / name)
        assert grid.size == (64, 64)
        boxes = [(0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64)]
        expected = draw_pictures(
            components, [texts[name]] * 4, seeds=[2, 3, 4, 5], settings=settings
        )
        for box, right in zip(boxes, expected, strict=True):
            assert np.abs(np.asarray(grid.crop(box)).astype(int) - right).max() <= 1
    assert listed.scorer.format(output="out", side=32).endswith("out/images 32")


def test_an_interrupted_list_is_resumed(components, metadata, tmp_path, monkeypatch):
    listed = geneval_files(metadata, per_prompt=2, seed=0)
    whole, output = tmp_path / "whole", tmp_path / "out"
    draw_files(OwnModel(components), listed, output=whole, settings=SETTINGS, batch_size=1)
    save, saved = prompt_lists._save, []

    def stop(path, pictures):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, pictures)

    monkeypatch.setattr(prompt_lists, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        draw_files(OwnModel(components), listed, output=output, settings=SETTINGS, batch_size=1)
    monkeypatch.setattr(prompt_lists, "_save", save)
    times = {path: path.stat().st_mtime_ns for path in saved}
    assert (
        draw_files(OwnModel(components), listed, output=output, settings=SETTINGS, batch_size=1)
        == 1
    )
    assert {path: path.stat().st_mtime_ns for path in saved} == times
    for path in whole.rglob("*.*"):
        assert (output / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert not list(output.rglob(".snapgen-*"))


def test_a_folder_of_other_pictures_is_refused(tmp_path):
    output = tmp_path / "out"
    claim_folder(output, {"model": "m", "steps": 4})
    claim_folder(output, {"model": "m", "steps": 4})
    with pytest.raises(UserError, match="has pictures with other --steps: choose another --output"):
        claim_folder(output, {"model": "m", "steps": 8})
    claim_folder(output, {"model": "m", "steps": 4, "prompts": "1"})  # not recorded before
    with pytest.raises(UserError, match="has pictures with other prompts"):
        claim_folder(output, {"model": "m", "steps": 4, "prompts": "2"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("")
    with pytest.raises(UserError, match="exists already"):
        claim_folder(tmp_path / "mine", {})


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"prompt": "a"}', '{"tag": "a", "include": [], "prompt": 1}']
)
def test_a_damaged_line_is_named(metadata, line):
    with open(metadata, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"line 3: expected the keys tag, include and prompt"):
        geneval_files(metadata, per_prompt=4, seed=0)


def test_lists_that_are_none_are_one_line(tmp_path, prompts):
    with pytest.raises(UserError, match="cannot read"):
        geneval_files(tmp_path / "none.jsonl", per_prompt=4, seed=0)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no prompts"):
        geneval_files(tmp_path / "empty.jsonl", per_prompt=4, seed=0)
    with pytest.raises(UserError, match=r"DPG-Bench's folder of \.txt files"):
        dpg_files(tmp_path / "none", seed=0)
    (prompts / "a.b.txt").write_text("a cat")
    with pytest.raises(UserError, match="up to the first dot"):
        dpg_files(prompts, seed=0)
    (prompts / "a.b.txt").unlink()
    (prompts / "2.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"2\.txt is empty"):
        dpg_files(prompts, seed=0)
