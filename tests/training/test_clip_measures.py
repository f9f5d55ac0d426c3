"""CLIP score and CMMD are their formulas; on transformers' features they give the same."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_snapgen.checkpoint.clip_towers import load_clip_towers
from mlx_snapgen.errors import UserError
from tests.runtime.test_clip import MERGES
from tests.runtime.test_clip_towers import make_towers, original, processor, some_pictures
from train.evaluation import clip_measures
from train.evaluation.clip_measures import clip_score, cmmd, embed_pictures, embed_texts


def embeddings(count, *, seed, dims=7):
    x = np.random.default_rng(seed).normal(size=(count, dims)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def direct_cmmd(x, y):
    """The definition, one pair at a time."""

    def mean(a, b):
        total = 0.0
        for p in a.astype(np.float64):
            for q in b.astype(np.float64):
                total += np.exp(-((p - q) ** 2).sum() / (2 * 10**2))
        return total / (len(a) * len(b))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize("sizes", [(5, 9), (1, 1), (12, 3)])
def test_cmmd_is_its_definition(sizes, monkeypatch):
    x, y = embeddings(sizes[0], seed=0), embeddings(sizes[1], seed=1)
    monkeypatch.setattr(clip_measures, "BLOCK", 4)
    assert cmmd(x, y) == pytest.approx(direct_cmmd(x, y), rel=1e-9)


def test_cmmd_is_zero_for_the_same_pictures_and_grows_with_the_distance():
    x = embeddings(20, seed=0)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    assert cmmd(x, x[::-1]) == pytest.approx(0, abs=1e-9)
    apart = [x * np.cos(a) + embeddings(1, seed=3) * np.sin(a) for a in (0.2, 0.5, 1.0)]
    values = [cmmd(x, y / np.linalg.norm(y, axis=1, keepdims=True)) for y in apart]
    assert 0 < values[0] < values[1] < values[2]
    # Two opposite points: 2 - 2 exp(-4 / 200).
    assert cmmd(x[:1], -x[:1]) == pytest.approx(1000 * (2 - 2 * np.exp(-0.02)), rel=1e-6)
    with pytest.raises(UserError, match="at least one picture"):
        cmmd(x, x[:0])


def test_clip_score_is_its_definition():
    pictures, texts = embeddings(9, seed=0), embeddings(9, seed=1)
    cosines = [float(p @ t) for p, t in zip(pictures.astype(float), texts, strict=True)]
    assert min(cosines) < 0 < max(cosines)
    expected = sum(100 * max(cosine, 0) for cosine in cosines) / 9
    assert clip_score(pictures, texts) == pytest.approx(expected, rel=1e-9)
    assert clip_score(pictures, pictures) == pytest.approx(100, rel=1e-6)
    assert clip_score(pictures, -pictures) == 0


def test_embeddings_do_not_depend_on_the_batches():
    clip = make_towers()
    pictures = list(some_pictures((24, 31), (50, 24), (24, 24), (30, 90), (31, 24)))
    whole = embed_pictures(clip, pictures)
    np.testing.assert_allclose(whole, embed_pictures(clip, pictures, batch_size=2), atol=1e-6)
    texts = ["a red apple", "the", "café"]
    np.testing.assert_allclose(
        embed_texts(clip, texts), embed_texts(clip, texts, batch_size=2), atol=1e-6
    )


def test_clip_in_bfloat16_gives_float32():
    """As on a GPU, where weights keep the type of the files."""
    clip, texts, pictures = make_towers(), ["a red apple"], list(some_pictures((24, 24)))
    exact = embed_texts(clip, texts), embed_pictures(clip, pictures)
    clip.set_dtype(mx.bfloat16)
    for found, expected in zip(
        (embed_texts(clip, texts), embed_pictures(clip, pictures)), exact, strict=True
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=0.05)


def test_measures_equal_those_of_transformers_features(tmp_path):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    theirs = original(transformers, activation="quick_gelu", patch=8, side=32)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_bytes(MERGES)
    ours = load_clip_towers(tmp_path)
    texts = ["a red apple", "the", "12 others", "one café"]
    drawn = list(some_pictures(*[(32, 32)] * 4, seed=1))
    real = list(some_pictures((64, 64), (40, 40), (36, 32), seed=2))

    def features(pictures):
        images = [Image.fromarray(picture) for picture in pictures]
        given = processor(transformers, 32)(images)["pixel_values"]
        with torch.no_grad():
            out = theirs.get_image_features(pixel_values=torch.tensor(np.stack(given)))
        out = getattr(out, "pooler_output", out)
        return (out / out.norm(dim=-1, keepdim=True)).numpy()

    tokens, mask = ours.text_encoder.tokenize(texts)
    with torch.no_grad():
        out = theirs.get_text_features(
            input_ids=torch.tensor(np.array(tokens)),
            attention_mask=torch.tensor(np.array(mask)).long(),
        )
    out = getattr(out, "pooler_output", out)
    said = (out / out.norm(dim=-1, keepdim=True)).numpy()

    x, y = embed_pictures(ours, drawn), embed_pictures(ours, real)
    assert cmmd(x, y) == pytest.approx(direct_cmmd(features(drawn), features(real)), rel=1e-4)
    assert clip_score(x, embed_texts(ours, texts)) == pytest.approx(
        clip_score(features(drawn), said), rel=1e-4
    )
