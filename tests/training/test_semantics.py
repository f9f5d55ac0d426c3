"""What is where in the stickers' scenes."""

import hashlib

import numpy as np
import pytest

from mlx_snapgen.config import PLACE
from mlx_snapgen.errors import UserError
from mlx_snapgen.pictures import to_uint8
from train.data.crops import semantic_crops
from train.data.stickers import render as rendering
from train.data.stickers.scenes import sample_scene
from train.data.stickers.semantics import (
    CODE_CHANNELS,
    COLOR,
    COLOR_CHANNELS,
    SEMANTIC_CHANNELS,
    check_semantics,
    codes,
    right_share,
    semantic_map,
    table_keys,
    things_at,
)
from train.data.stickers.source import Stickers, ValidationStickers
from train.data.stickers.vocabulary import FLUENT


@pytest.mark.parametrize(("channels", "count"), [(8, 240), (4, 24)])
def test_codes_are_far_apart(channels, count):
    """Vectors of mean square 1, at least 60 degrees from each other."""
    found = codes(channels)
    assert found.shape == (count, channels)
    products = found @ found.T
    np.testing.assert_allclose(np.diag(products), channels, rtol=1e-6)
    assert (products - channels * np.eye(count)).max() <= channels / 2 + 1e-3
    # Balanced, so that latents of mean 0 and variance 1 hardly move them.
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.square(found).mean(0), 1, atol=1e-6)


def test_each_key_answers_to_its_code_alone():
    weight, bias = table_keys()
    for nouns, colors in ((codes(8), np.zeros((240, 4))), (np.zeros((24, 8)), codes(4))):
        values = np.concatenate([nouns, colors], axis=1) @ weight.T + bias
        answers = 1 / (1 + np.exp(-values))
        own = np.arange(len(nouns)) + (0 if len(nouns) == 240 else 240)
        assert (answers[np.arange(len(nouns)), own] > 0.997).all()
        answers[np.arange(len(nouns)), own] = 0
        assert answers.max() < 0.0025


@pytest.mark.parametrize("size", [(256, 256), (192, 320)])
def test_a_map_has_each_things_code_color_and_the_place_in_it(size):
    """Read back from the map: nouns, colors, where they are, how large; nothing elsewhere."""
    seen = set()
    for seed in range(20):
        scene = sample_scene(np.random.default_rng(seed), size=size, collection=FLUENT)
        found = semantic_map(scene, 16)
        assert found.shape == (size[0] // 16, size[1] // 16, SEMANTIC_CHANNELS)
        rest = np.ones(found.shape[:2], bool)
        for placed in scene.placed:
            rows = np.arange(found.shape[0]) * 16 + 8
            columns = np.arange(found.shape[1]) * 16 + 8
            y = (placed.y < rows) & (rows < placed.y + placed.size_px)
            x = (placed.x < columns) & (columns < placed.x + placed.size_px)
            inside = np.ix_(y, x)
            assert found[inside].size
            nearest = np.argmax(found[inside][..., :CODE_CHANNELS] @ codes().T, -1)
            assert (nearest == FLUENT.nouns.index(placed.noun)).all()
            right, down = np.moveaxis(found[inside][..., PLACE], -1, 0) / 1.7
            np.testing.assert_allclose(
                right + 0 * down,
                (columns[x] - placed.center[0]) / (placed.size_px / 2) + 0 * down,
                atol=1e-5,
            )
            np.testing.assert_allclose(
                down.T, (rows[y] - placed.center[1]) / (placed.size_px / 2) + 0 * down.T, atol=1e-5
            )
            color = 0 if placed.color is None else 1 + list(FLUENT.colors).index(placed.color)
            expected = codes(COLOR_CHANNELS)[color - 1] if color else np.zeros(COLOR_CHANNELS)
            assert (found[inside][..., COLOR] == expected).all()
            assert (things_at(found)[inside] == 25 * (1 + nearest) + color).all()
            seen.add(color > 0)
            rest[inside] = False
        assert not found[rest].any() and not things_at(found)[rest].any()
    assert seen == {False, True}


def test_the_share_of_places_with_the_right_noun_and_color(fluent_pictures):
    source = ValidationStickers(num_nouns=12, pictures=rendering.find_pictures(fluent_pictures))
    true = source.semantics(0, 16, factor=16)
    np.testing.assert_array_equal(true[3], semantic_map(source.scenes(1, 3)[0], 16))
    assert right_share(true, true) == right_share(0.9 * true - 0.1, true) == 1
    assert right_share(0 * true, true) == 0
    things = things_at(true) > 0
    colored = things & (things_at(true) % 25 > 0)
    assert 0 < colored.sum() < things.sum()
    plain = np.array(true)
    plain[..., COLOR] = 0
    assert right_share(plain, true) == pytest.approx(1 - colored.sum() / things.sum())


def test_trained_models_depend_on_the_order_of_codes_nouns_and_colors():
    names = ",".join([*(noun.name for noun in FLUENT.nouns), *FLUENT.colors])
    numbers = [(2 * codes(n)).astype(np.int8).tobytes() for n in (CODE_CHANNELS, COLOR_CHANNELS)]
    found = hashlib.sha256(b"".join(numbers) + names.encode()).hexdigest()
    assert found[:16] == "25a3d0cef3d72be8"


def test_crops_and_their_maps_belong_together(fluent_pictures):
    """A crop's map is the part of the whole map where the crop was cut, of any shape."""
    found = rendering.find_pictures(fluent_pictures)
    source = Stickers(seed=3, num_nouns=12, pictures=found)
    shapes = {source.batch(k, 1)[0].shape[1:3]: k for k in range(16)}
    number = next(k for shape, k in shapes.items() if shape[0] < shape[1])
    pictures, maps = semantic_crops(source, number, count=4, size=100, seed=0, factor=16)
    assert pictures.shape == (4, 96, 96, 4) and maps.shape == (4, 6, 6, 14)
    whole, _ = source.batch(number, 4)
    whole_maps = source.semantics(number, 4, factor=16)
    for k in range(4):
        corners = [
            (i, j)
            for i in range(whole_maps.shape[1] - 5)
            for j in range(whole_maps.shape[2] - 5)
            if np.array_equal(whole_maps[k, i : i + 6, j : j + 6], maps[k])
        ]
        crop = to_uint8(pictures)[k]
        assert any(
            np.array_equal(whole[k, 16 * i : 16 * i + 96, 16 * j : 16 * j + 96], crop)
            for i, j in corners
        )
    again, same = semantic_crops(source, number, count=4, size=100, seed=0, factor=16)
    np.testing.assert_array_equal(np.array(again), np.array(pictures))
    np.testing.assert_array_equal(same, maps)


def test_only_collections_with_enough_codes():
    with pytest.raises(UserError, match="at most 240 nouns apart, not 363: --data stickers:nouns="):
        Stickers().semantics(0, 1, factor=8)
    assert Stickers(num_nouns=100).semantics(0, 2, factor=8).shape == (2, 16, 16, 14)
    check_semantics(len(FLUENT.nouns))
