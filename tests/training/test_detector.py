"""The detector finds what the renderer drew, in clean and in poor pictures, and little else."""

from collections import Counter

import numpy as np
import pytest

from mlx_snapgen.errors import UserError
from tests.tiny import drawn_box
from train.data.stickers.captions import Placed, Scene
from train.data.stickers.render import find_font, render, sprite
from train.data.stickers.scenes import sample_scene
from train.data.stickers.vocabulary import NOTO, NOUNS
from train.evaluation.stickers.detector import Detector, background_color, foreground
from train.evaluation.stickers.geneval import SIX, is_correct

SIDE = NOTO.size[0]
NUM_NOUNS = 100
PER_CATEGORY = 35
NOUN = {noun.name: noun for noun in NOUNS}


@pytest.fixture(scope="module")
def detector() -> Detector:
    try:
        find_font()
    except UserError as error:
        pytest.skip(str(error))
    return Detector(NOTO.first(NUM_NOUNS))


def some_scenes(category, count=PER_CATEGORY):
    c = SIX.index(category)
    return [
        sample_scene(np.random.default_rng((77, c, k)), NUM_NOUNS, category=category)
        for k in range(count)
    ]


def blurred(picture, sigma):
    """A Gaussian blur of `sigma` pixels."""
    x = np.arange(-int(3 * sigma) - 1, int(3 * sigma) + 2)
    kernel = np.exp(-0.5 * (x / sigma) ** 2)
    kernel /= kernel.sum()
    out = picture.astype(np.float64)
    for axis in (0, 1):
        pad = [(len(x) // 2,) * 2 if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(out, pad, mode="edge")
        size = picture.shape[axis]
        out = sum(w * padded.take(range(k, k + size), axis) for k, w in enumerate(kernel))
    return out


def poor(picture, seed, sigma=1.0, noise=8.0):
    """Blurred and noisy."""
    rng = np.random.default_rng(seed)
    out = blurred(picture, sigma) + rng.normal(0, noise, picture.shape)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def shown(scene):
    return Counter((p.noun.name, p.color or p.noun.own_color) for p in scene.placed)


def found(detections):
    return Counter((d.noun, d.color) for d in detections)


def alone(name, size=72, background="white"):
    """One glyph in the middle."""
    corner = (SIDE - size) // 2
    return Scene("single_object", (Placed(NOUN[name], None, size, corner, corner),), background)


@pytest.mark.parametrize("category", SIX)
def test_finds_exactly_what_was_rendered(detector, category):
    right = [shown(s) == found(detector(render(s))) for s in some_scenes(category)]
    assert np.mean(right) >= 0.97


def test_finds_it_in_blurred_and_noisy_pictures(detector):
    scenes = [scene for category in SIX for scene in some_scenes(category, 12)]
    pictures = [poor(render(scene), k) for k, scene in enumerate(scenes)]
    found_in = [detector(picture) for picture in pictures]
    assert np.mean([shown(s) == found(d) for s, d in zip(scenes, found_in, strict=True)]) >= 0.95
    assert np.mean([is_correct(s, d) for s, d in zip(scenes, found_in, strict=True)]) >= 0.95


@pytest.mark.parametrize("category", SIX)
def test_pictures_of_other_prompts_score_about_nothing(detector, category):
    scenes = some_scenes(category)
    pictures = [render(scene) for scene in scenes]
    wrong = [
        is_correct(scene, detector(picture))
        for scene, picture in zip(scenes, pictures[1:] + pictures[:1], strict=True)
    ]
    assert np.mean(wrong) <= 0.06


def test_boxes_lie_where_the_glyphs_are(detector):
    for scene in some_scenes("position", 10):
        boxes = {d.noun: d.box for d in detector(render(scene))}
        for placed in scene.placed:
            drawn = drawn_box(placed)
            assert np.abs(np.array(boxes[placed.noun.name]) - drawn).max() <= 4


def test_objects_that_touch_are_told_apart(detector):
    for a, b in (("apple", "car"), ("cat", "tree"), ("house", "fish"), ("heart", "turtle")):
        left, right = (sprite(NOUN[name], None, 56) for name in (a, b))
        picture = np.full((SIDE, SIDE, 3), 255, np.uint8)
        x = 8
        for drawn in (left, right):
            h, w = drawn.rgb.shape[:2]
            under = picture[40 : 40 + h, x : x + w]
            under[:] = (under * drawn.keep >> 8) + drawn.rgb
            x += w
        assert sorted(d.noun for d in detector(picture)) == sorted((a, b))


@pytest.mark.parametrize("background", [(0, 0, 0, 0), (16, 16, 16, 255), (255, 96, 208, 255)])
def test_objects_may_hide_most_of_the_rim(background):
    """A plain one a third of it, a colorful one more; the background is a bit noisy."""
    rng = np.random.default_rng(0)
    picture = np.broadcast_to(np.array(background, np.int64), (SIDE, SIDE, 4))
    picture = np.clip(picture + rng.integers(-2, 3, picture.shape), 0, 255).astype(np.uint8)
    picture[:, SIDE // 2 :] = rng.integers(0, 255, (SIDE, SIDE // 2, 4))
    picture[: SIDE // 4, : SIDE // 4] = 130
    assert np.abs(background_color(picture) - background).max() <= 1
    picture = np.broadcast_to(np.array(background, np.int64), (SIDE, SIDE, 4))
    picture = np.clip(picture + rng.integers(-2, 3, picture.shape), 0, 255).astype(np.uint8)
    picture[: SIDE // 2, : SIDE * 4 // 5] = 130
    assert np.abs(background_color(picture) - background).max() <= 1


def test_big_objects_that_touch_are_told_apart(detector):
    """Four of them fill the picture and overlap a bit: 29 of 40; without cuts in the middle, 20."""
    right = 0
    for noun in NOUNS[:40]:
        corners = ((0, 0), (62, 0), (0, 62), (62, 62))
        placed = tuple(Placed(noun, None, 66, *corner) for corner in corners)
        detections = detector(render(Scene("size", placed, "white")))
        right += [d.noun for d in detections] == [noun.name] * 4
    assert right >= 26


def test_garbage_is_mostly_nothing(detector):
    rng = np.random.default_rng(0)
    names = [noun.name for noun in detector.nouns]
    pairs = [rng.choice(names, 2, replace=False) for _ in range(40)]
    both = [np.stack([render(alone(name)) for name in pair]) for pair in pairs]
    mixtures = [np.rint(b.mean(axis=0)).astype(np.uint8) for b in both]
    assert np.mean([len(detector(picture)) for picture in mixtures]) <= 0.3
    halves = [b[0].copy() for b in both]
    for picture in halves:
        picture[:, SIDE // 2 :] = 255
    assert np.mean([len(detector(picture)) for picture in halves]) <= 0.15
    blots = []
    for _ in range(20):
        spots = blurred(rng.normal(0, 1, (SIDE, SIDE, 3)), 6.0)
        edge = blurred(rng.normal(0, 1, (SIDE, SIDE, 1)), 8.0)
        edge = edge / edge.std() - np.hypot(*np.mgrid[-2:2:128j, -2:2:128j])[..., None] + 1
        blots.append(np.where(edge > 0, np.clip(128 + 80 * spots / spots.std(), 0, 255), 255))
    assert np.mean([len(detector(blot.astype(np.uint8))) for blot in blots]) <= 0.15


def test_a_mangled_object_is_left_over(detector):
    noun = NOUN["apple"]
    places = [(4, 4), (68, 4), (4, 68)]
    placed = tuple(Placed(noun, None, 56, x, y) for x, y in places)
    scene = Scene("counting", placed, "white")
    picture = render(scene)
    detections = detector(picture)
    assert detector.leftover(picture, detections) < 0.02
    assert is_correct(scene, detections, detector.leftover(picture, detections))
    picture[76:116, 76:116] = np.random.default_rng(0).integers(0, 255, (40, 40, 3))
    detections = detector(picture)
    assert [d.noun for d in detections] == ["apple"] * 3
    assert 0.5 < detector.leftover(picture, detections) < 1.5
    assert not is_correct(scene, detections, detector.leftover(picture, detections))
    assert detector.leftover(picture, []) == 0


def test_an_empty_picture_holds_nothing(detector):
    assert detector(np.full((SIDE, SIDE, 3), 200, np.uint8)) == []
    noise = np.random.default_rng(0).normal(128, 8, (SIDE, SIDE, 3))
    assert detector(noise.astype(np.uint8)) == []


def test_noun_without_other_colors_has_none_and_own_color_has_a_name(detector):
    (cat,) = detector(render(alone("cat")))
    (apple,) = detector(render(alone("apple")))
    assert (cat.noun, cat.color) == ("cat", None)
    assert (apple.noun, apple.color) == ("apple", "red")
    assert 0.96 < cat.score < 2


def test_background_and_foreground_of_a_glyph_at_the_edge():
    picture = np.full((64, 64, 3), 150, np.uint8)
    picture[:30, :20] = (200, 30, 30)
    background = background_color(picture)
    assert background.tolist() == [150, 150, 150]
    mask = foreground(picture, background)
    assert mask[:30, :20].all() and not mask[32:].any() and not mask[:, 22:].any()
