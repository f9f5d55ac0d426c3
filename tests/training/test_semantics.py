"""What is where in the stickers' scenes."""

import hashlib

import numpy as np
import pytest

from mlx_snapgen.errors import UserError
from mlx_snapgen.semantics import COLOR, GROUND, PLACE, SEEN_CHANNELS, THING, codes
from train.data.stickers import render as rendering
from train.data.stickers.scenes import sample_scene
from train.data.stickers.semantics import (
    check_semantics,
    right_share,
    semantic_map,
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


@pytest.mark.parametrize("size", [(256, 256), (192, 320)])
def test_a_map_has_each_things_code_color_and_the_place_in_it(size):
    """Read back from the map: nouns, colors, where they are, how large; the ground elsewhere."""
    seen, grounds = set(), set()
    for seed in range(20):
        scene = sample_scene(np.random.default_rng(seed), size=size, collection=FLUENT)
        found = semantic_map(scene, 16)
        assert found.shape == (size[0] // 16, size[1] // 16, SEEN_CHANNELS)
        rest = np.ones(found.shape[:2], bool)
        grounds.add(scene.background)
        ground = codes(4)[list(FLUENT.backgrounds).index(scene.background)]
        assert (found[..., GROUND] == ground).all()
        for placed in scene.placed:
            rows = np.arange(found.shape[0]) * 16 + 8
            columns = np.arange(found.shape[1]) * 16 + 8
            y = (placed.y < rows) & (rows < placed.y + placed.size_px)
            x = (placed.x < columns) & (columns < placed.x + placed.size_px)
            inside = np.ix_(y, x)
            assert found[inside].size
            nearest = np.argmax(found[inside][..., THING] @ codes(8).T, -1)
            assert (nearest == FLUENT.nouns.index(placed.noun)).all()
            right, down, large = np.moveaxis(found[inside][..., PLACE], -1, 0)
            right, down = right / 1.7, down / 1.7
            np.testing.assert_allclose(96 * 2.0**large, placed.size_px, rtol=1e-6)
            # Squares are made of whole places.
            assert found[inside].shape[:2] == (placed.size_px // 16,) * 2
            np.testing.assert_allclose(
                right + 0 * down,
                (columns[x] - placed.center[0]) / (placed.size_px / 2) + 0 * down,
                atol=1e-5,
            )
            np.testing.assert_allclose(
                down.T, (rows[y] - placed.center[1]) / (placed.size_px / 2) + 0 * down.T, atol=1e-5
            )
            color = 0 if placed.color is None else 1 + list(FLUENT.colors).index(placed.color)
            expected = codes(4)[color - 1] if color else np.zeros(4)
            assert (found[inside][..., COLOR] == expected).all()
            assert (things_at(found)[inside] == 25 * (1 + nearest) + color).all()
            seen.add(color > 0)
            rest[inside] = False
        assert not np.delete(found[rest], GROUND, -1).any() and not things_at(found)[rest].any()
    assert seen == {False, True} and len(grounds) > 2


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


def test_trained_models_depend_on_the_order_of_codes_and_words():
    names = [*(noun.name for noun in FLUENT.nouns), *FLUENT.colors, *FLUENT.backgrounds]
    numbers = [(2 * codes(n)).astype(np.int8).tobytes() for n in (8, 4)]
    found = hashlib.sha256(b"".join(numbers) + ",".join(names).encode()).hexdigest()
    assert found[:16] == "1068ba16687c7808"


def test_only_collections_with_enough_codes():
    with pytest.raises(UserError, match="at most 240 nouns apart, not 363: --data stickers:nouns="):
        Stickers().semantics(0, 1, factor=8)
    assert Stickers(num_nouns=100).semantics(0, 2, factor=8).shape == (2, 16, 16, 19)
    check_semantics(len(FLUENT.nouns))
