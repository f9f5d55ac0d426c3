"""What is where in the stickers' scenes."""

import dataclasses
import hashlib

import mlx.core as mx
import numpy as np
import pytest

from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.semantics import agreed, as_codes, mended
from mlx_snapgen.semantics import (
    CHANNELS,
    COLOR,
    COLUMN,
    GROUND,
    PLACE,
    ROW,
    SEEN_CHANNELS,
    SIDE,
    THING,
    SemanticConfig,
    codes,
)
from tests.tiny import semantic_map_of
from train.data.stickers import render as rendering
from train.data.stickers.scenes import sample_scene
from train.data.stickers.semantics import (
    check_semantics,
    right_share,
    semantic_map,
    things_at,
)
from train.data.stickers.source import Stickers, ValidationStickers
from train.data.stickers.strangers import strangers
from train.data.stickers.vocabulary import FLUENT, collection_in

SEMANTIC = SemanticConfig(150, (2, 4, 6, 8, 10, 12, 14, 16))


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


def test_strangers_have_no_codes(tmp_path):
    """Some kinds of things are other pictures of the folder then, in all their places, where the
    background has no code either; all else is as without them."""
    known = collection_in(tmp_path).first(12)
    names = ["1f9a2", "270d-fe0f", "1f91a-1f3fe", "notes", "fffffffff"]
    names += ["-".join(f"{ord(character):x}" for character in noun.emoji) for noun in known]
    for name in names:
        (tmp_path / f"{name}.webp").touch()
    others = strangers(tmp_path, 12)
    assert [noun.emoji for noun in others] == ["\U0001f9a2", "\u270d\ufe0f"]
    plain = Stickers(seed=3, num_nouns=12, pictures=tmp_path)
    source = dataclasses.replace(plain, strangers=True)
    assert source.settings() == plain.settings() and source.prompts(0, 9) == plain.prompts(0, 9)
    kinds = total = 0
    for number in range(5):
        maps = [one.semantics(number, 8, factor=16) for one in (source, plain)]
        scenes = source.scenes(number, 8), plain.scenes(number, 8)
        for found, before, scene, old in zip(*maps, *scenes, strict=True):
            strange = np.zeros(found.shape[:2], bool)
            swapped = {}
            for one, other in zip(scene.placed, old.placed, strict=True):
                assert swapped.setdefault(other.noun, one.noun) == one.noun
                assert one.cell == other.cell
                if one.noun != other.noun:
                    assert one.noun in others and one.color is None
                    x, y, width, height = (length // 16 for length in one.cell)
                    strange[y : y + height, x : x + width] = True
            kinds += len(swapped)
            total += sum(a != b for a, b in swapped.items())
            assert not found[strange].any()
            np.testing.assert_array_equal(found[~strange], before[~strange])
    assert 0.25 < total / kinds < 0.55


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


def scenes_maps() -> mx.array:
    """Of 12 scenes with up to six things; float32 (12, 16, 16, S)."""
    scenes = (sample_scene(np.random.default_rng(k), 150, collection=FLUENT) for k in range(12))
    return mx.array(np.stack([semantic_map(scene, 16) for scene in scenes]))


def test_a_thing_has_one_code_and_one_square():
    """Exact maps stay as they are, and those in which each place errs are mended: three places of
    ten say another square then, two of a hundred another thing."""
    exact = scenes_maps()
    right = np.array(as_codes(exact, SEMANTIC))
    np.testing.assert_array_equal(np.array(agreed(exact, SEMANTIC)), right)
    np.testing.assert_array_equal(np.array(mended(mx.array(right), SEMANTIC)), right)
    errors = mx.random.normal(exact.shape, key=mx.random.key(0))
    errors = errors * mx.array([1.0] * 8 + [0.5] * 8 + [0.25] * 3)
    seen = exact + errors
    is_thing = right[..., THING].any(-1)

    def wrong_share(found: mx.array, part: slice) -> float:
        return (np.abs(np.array(found)[..., part] - right[..., part]).max(-1) > 1e-5)[
            is_thing
        ].mean()

    square = slice(COLUMN.start, SIDE.stop)
    alone, together = as_codes(seen, SEMANTIC), agreed(seen, SEMANTIC)
    assert wrong_share(alone, square) > 0.3 and wrong_share(alone, THING) > 0.02
    assert wrong_share(together, square) == wrong_share(together, THING) == 0
    # The decoder mends codes of which some are wrong.
    drawn = mx.random.uniform(shape=(*right.shape[:3], 1), key=mx.random.key(1)) < 0.2
    mixed = mx.where(drawn, mx.array(np.roll(right, 5, axis=2)), mx.array(right))
    assert wrong_share(mixed, slice(0, CHANNELS)) > 0.1
    assert wrong_share(mended(mixed, SEMANTIC), slice(0, CHANNELS)) < 0.005


def test_things_far_from_the_corner_are_unknown():
    """Large pictures have no pairs of all their places; what is near the corner stays."""
    config = SemanticConfig(3, (2, 4))
    things = (1, 3, 4, 2, 3), (2, 5, 2, 23, 20)
    known = mx.array(semantic_map_of(things, (9, 25), config=config))
    near = np.array(mended(known, config))
    rest = [(0, 0), (0, 41), (0, 25), (0, 0)]
    far = mx.pad(known, rest) + mx.pad(mx.zeros_like(known), rest, constant_values=0.01)
    far[0, 40:44, 30:34, THING] = mx.array(codes(8)[0])
    found = np.array(mended(far, config))
    np.testing.assert_array_equal(found[:, :9, :25], near)
    assert near[..., THING].any() and not found[:, 9:].any() and not found[:, :, 25:].any()
    # A thing that the encoder sees there is unknown, and one that is cut off by the edge.
    seen = np.zeros((1, 45, 50, SEEN_CHANNELS), np.float32)
    seen[..., GROUND] = codes(4)[3]
    line = 1.7 * np.array([-0.75, -0.25, 0.25, 0.75])
    for y, x in ((20, 20), (40, 44), (0, 10)):
        part = seen[0, y : y + 4, x : x + 4]
        part[..., THING], part[..., PLACE.stop - 1] = codes(8)[1], np.log2(4 / 6)
        part[..., PLACE.start], part[..., PLACE.start + 1] = line, line[:, None]
    seen[0, :3, 10:14], seen[0, 3, 10:14] = seen[0, 1:4, 10:14].copy(), 0
    for function in (agreed, as_codes):
        found = np.array(function(mx.array(seen), config))[0]
        is_thing = found[..., THING].any(-1)
        assert is_thing[20:24, 20:24].all() and is_thing.sum() == 16, function
        assert not found[40:44, 44:48].any() and not found[:3, 10:14].any(), function


def test_votes_are_counted_as_said():
    """The same as place by place in plain Python, for things that hardly agree."""
    config = SemanticConfig(3, (2, 3, 4))
    rng = np.random.default_rng(1)
    agreements = 0
    # At .6 the votes depend on each of the constants.
    for height, width, noise in ((5, 7, 0.1), (4, 6, 0.9), (1, 6, 0.2), *[(6, 6, 0.6)] * 30):
        seen = rng.normal(size=(1, height, width, SEEN_CHANNELS)).astype(np.float32)
        for y, x, side in ((0, 0, 2), (2, 1, 3)):
            part = seen[0, y : y + side, x : x + side]
            rows, columns = np.mgrid[: part.shape[0], : part.shape[1]]
            line = 1.7 * ((np.arange(side) + 0.5) / side * 2 - 1)
            part[..., THING] = codes(8)[side - 1] + 0.3 * part[..., THING]
            true = [line[columns], line[rows], np.full(rows.shape, np.log2(side / 6))]
            part[..., PLACE] = np.stack(true, -1) + noise * part[..., PLACE]
        expected, count = agreed_in_loops(seen[0], 3, config.sides)
        agreements += count
        found = np.array(agreed(mx.array(seen), config))[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert agreements > 60


def agreed_in_loops(seen: np.ndarray, things: int, sides: tuple[int, ...]):
    """See `agreed`. Map (h, w, S) -> semantic latents, and the number of squares."""
    places = list(np.ndindex(seen.shape[:2]))

    def nearest(place, part, count=None):
        known = codes(part.stop - part.start)[:count]
        found = known @ seen[place][part] if isinstance(place, tuple) else known @ place
        return known[found.argmax()] * (found.max() > known.shape[1] / 2)

    def named(place):
        x, y, size = seen[place][PLACE]
        side = min(sides, key=lambda side: abs(size - np.log2(side / 6)))
        right, down = (np.clip(int((v / 1.7 + 1) * side // 2), 0, side - 1) for v in (x, y))
        return place[0] - down, place[1] - right, side

    def covers(square, place):
        y, x, side = square
        return y <= place[0] < y + side and x <= place[1] < x + side

    def fit(square):
        y, x, side = square
        total = -3 * side**2
        for place in filter(is_thing.get, places):
            if covers(square, place):
                right, down = (1.7 * ((2 * a + 1) / side - 1) for a in (place[1] - x, place[0] - y))
                misfit = (seen[place][PLACE] - [right, down, np.log2(side / 6)]) / (0.2, 0.2, 0.25)
                total += max(6 - np.square(misfit).sum(), -3) + 3
        return total

    is_thing = {place: nearest(place, THING, things).any() for place in places}
    squares = [named(place) for place in filter(is_thing.get, places)]
    votes = {
        place: max((square for square in squares if covers(square, place)), key=fit)
        for place in filter(is_thing.get, places)
    }
    result = np.zeros((*seen.shape[:2], CHANNELS), np.float32)
    for place in places:
        result[place][GROUND] = 0 if is_thing[place] else nearest(place, GROUND)

    def share(square):
        voters = [place for place, vote in votes.items() if vote == square]
        return sum(covers(square, place) for place in voters) / square[2] ** 2

    # Where two overlap, the one with the larger share stays, or else the first.
    squares, count = list(dict.fromkeys(votes.values())), 0
    for square in sorted(reversed(squares), key=share):
        y, x, side = square
        inside = [place for place in places if covers(square, place)]
        if min(y, x) < 0 or share(square) <= 0.5:
            continue
        count += 1
        for place in inside:
            for part, known in ((THING, things), (COLOR, None)):
                mean = sum(seen[other][part] for other in inside) / side**2
                result[place][part] = nearest(mean, part, known)
            result[place][GROUND] = nearest(place, GROUND)
            for part, value in ((COLUMN, x), (ROW, y), (SIDE, sides.index(side))):
                result[place][part] = codes(4)[value]
    return result, count


def test_only_collections_with_enough_codes():
    with pytest.raises(UserError, match="at most 240 nouns apart, not 363: --data stickers:nouns="):
        Stickers().semantics(0, 1, factor=8)
    assert Stickers(num_nouns=100).semantics(0, 2, factor=8).shape == (2, 16, 16, 19)
    check_semantics(len(FLUENT.nouns))
