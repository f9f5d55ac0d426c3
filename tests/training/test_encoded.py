"""Batches of latents and text: dropped captions, frozen encoders, states from the data."""

import dataclasses
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import train.loop.trainer
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.text_encoders.sentencepiece import SentencePieceTokenizer
from tests import tiny
from train.data.encoded import EncodedBatches
from train.data.source import Samples
from train.data.streams import Stream
from train.data.text import FrozenStates, kept_captions, padded_states
from train.loop.checkpoint import latest_checkpoint
from train.loop.config import TrainingConfig
from train.loop.trainer import Trainer
from train.objectives.elastic import (
    ElasticStep,
    TextToLatents,
    elastic_gradients,
    noisy,
    text_states,
)
from train.objectives.flow import Flow

CAPTIONS = ["a red car", "an apple next to a blue cat", "two cats", "a green apple"]


class Fixed:
    """The same latents in every batch, with captions that differ."""

    def __init__(self, states=None):
        self.states = states or {}

    def samples(self, number, count):
        latents = mx.random.normal((count, 4, 4, 4), key=mx.random.key(number))
        captions = [CAPTIONS[(number + k) % len(CAPTIONS)] for k in range(count)]
        states = {
            name: [states[CAPTIONS.index(c)] for c in captions]
            for name, states in self.states.items()
        }
        return Samples(latents, captions, states)

    def settings(self):
        return {"data": "fixed"}


def own_encoder(hidden_size=16, max_length=12):
    config = dataclasses.replace(tiny.TEXT, hidden_size=hidden_size, max_length=max_length)
    tokenizer = SentencePieceTokenizer(tiny.tokenizer_bytes(), max_length)
    return config, tokenizer


@pytest.fixture
def clip():
    return tiny.make_clip(b"a p\nap p", 32, num_heads=2)


@pytest.fixture
def model(clip):
    """A frozen CLIP and a trained encoder."""
    own, tokenizer = own_encoder()
    config = dataclasses.replace(
        tiny.STUDENT,
        transformer=dataclasses.replace(tiny.STUDENT.transformer, text_dims=(32, 16)),
        text_encoders=(clip.config, own),
    )
    mx.random.seed(3)
    return TextToLatents(config, [None, tokenizer], frozen={0: clip})


def batches(encoders, source=None, *, drop=0.0, absent=True, batch_size=4, **more):
    return EncodedBatches(
        source or Fixed(),
        encoders,
        batch_size=batch_size,
        seed=0,
        drop_caption=drop,
        absent=absent,
        **more,
    )


# --- dropping -----------------------------------------------------------------------------------


def test_share_of_samples_without_any_text():
    """All encoders together with probability p; each alone with p otherwise."""
    for encoders, expected in ((1, 0.1), (2, 0.1 + 0.9 * 0.01), (3, 0.1 + 0.9 * 0.001)):
        rng = np.random.default_rng(0)
        kept = kept_captions(rng, 200_000, encoders=encoders, drop=0.1)
        assert (~kept.any(1)).mean() == pytest.approx(expected, abs=0.003)
        if encoders > 1:
            assert (~kept).mean(0) == pytest.approx([0.1 + 0.9 * 0.1] * encoders, abs=0.003)


def test_one_encoder_drops_the_captions_that_it_always_did():
    kept = kept_captions(Stream.DROPPED_CAPTIONS.generator(5, 7), 32, encoders=1, drop=0.3)
    before = Stream.DROPPED_CAPTIONS.generator(5, 7).random(32) < 0.3
    np.testing.assert_array_equal(kept[:, 0], ~before)


def test_dropped_text_is_masked_out(model):
    data = batches(model.encoders, drop=0.4)
    seen = set()
    for number in range(12):
        batch, prompts = data.with_prompts(number)
        kept = kept_captions(Stream.DROPPED_CAPTIONS.generator(0, number), 4, encoders=2, drop=0.4)
        for i in (0, 1):
            np.testing.assert_array_equal(np.array(batch[f"mask_{i}"].any(1)), kept[:, i])
        assert [bool(p) for p in prompts] == kept.any(1).tolist()
        seen |= {tuple(row) for row in kept.tolist()}
    assert len(seen) == 4


@pytest.mark.parametrize("absent", [True, False])
def test_a_sample_without_a_caption_is_as_one_that_is_dropped(model, clip, absent):
    class Some(Fixed):
        def samples(self, number, count):
            found = super().samples(number, count)
            found.captions[1] = ""
            return found

    own = model.text_encoders[0]
    batch, prompts = batches(model.encoders, Some(), absent=absent).with_prompts(0)
    assert prompts == [CAPTIONS[0], "", *CAPTIONS[2:4]]
    masks = [np.array(batch[f"mask_{i}"]) for i in (0, 1)]
    if absent:
        assert not masks[0][1].any() and not masks[1][1].any()
    else:
        assert masks[0][1].sum() == len(FrozenStates(clip)(""))
        assert np.array_equal(masks[1][1], np.array(own.tokenize([""])[1][0]))
    assert all(mask[k].any() for mask in masks for k in (0, 2, 3))


def test_models_with_an_empty_prompt_get_it_where_all_is_dropped(model, clip):
    own = model.text_encoders[0]
    data = batches(model.encoders, drop=0.4, absent=False)
    tokens, mask = own.tokenize([""])
    states = FrozenStates(clip)("")
    for number in range(12):
        batch, prompts = data.with_prompts(number)
        for k, prompt in enumerate(prompts):
            if not prompt:
                assert mx.array_equal(batch["tokens_1"][k], tokens[0])
                assert mx.array_equal(batch["mask_1"][k], mask[0])
                assert batch["mask_0"][k].sum().item() == len(states)
                assert mx.array_equal(batch["states_0"][k, : len(states)], states)


def test_one_encoder_with_an_empty_prompt_is_as_before():
    _, tokenizer = own_encoder()
    encoder = TextToLatents(tiny.STUDENT, [tokenizer]).text_encoders[0]
    data = batches([encoder], drop=0.5, absent=False)
    for number in range(4):
        captions = Fixed().samples(number, 4).captions
        dropped = Stream.DROPPED_CAPTIONS.generator(0, number).random(4) < 0.5
        kept = ["" if d else c for d, c in zip(dropped, captions, strict=True)]
        tokens, mask = tokenizer(kept)
        batch, prompts = data.with_prompts(number)
        assert prompts == kept
        assert mx.array_equal(batch["tokens_0"], tokens) and mx.array_equal(batch["mask_0"], mask)


# --- states of frozen encoders ------------------------------------------------------------------


def test_states_do_not_depend_on_the_batch_and_are_padded_to_32(model, clip):
    data = batches(model.encoders)
    batch = data(0)
    assert batch["states_0"].shape == (4, 17, 32)  # 32 tokens, but for the encoder's limit
    for k, caption in enumerate(CAPTIONS):
        alone = FrozenStates(clip)(caption)
        assert mx.array_equal(batch["states_0"][k, : len(alone)], alone)
        tokens, mask = clip.tokenize([caption])
        expected = clip(tokens, mask)[0, : len(alone)]
        np.testing.assert_allclose(np.array(alone), np.array(expected), atol=1e-5)
        assert batch["mask_0"][k].tolist() == [i < len(alone) for i in range(17)]
    states, mask = padded_states([mx.ones((33, 2)), None], mx.ones((1, 2)))
    assert states.shape == (2, 64, 2)
    assert mask.sum(1).tolist() == [33, 0]


def test_repeated_captions_are_encoded_once(model, clip, monkeypatch):
    calls = []
    tokenize = clip.tokenize
    monkeypatch.setattr(
        clip, "tokenize", lambda prompts: calls.append(prompts) or tokenize(prompts)
    )
    data = batches(model.encoders)
    first = [data(k)["states_0"] for k in range(3)]
    assert sorted(p for (p,) in calls) == ["", *sorted(CAPTIONS)]
    again = batches(model.encoders)
    assert all(mx.array_equal(again(k)["states_0"], first[k]) for k in (2, 0, 1))


def test_states_of_the_data_replace_an_encoder(model, clip):
    stored = [np.array(FrozenStates(clip)(c)).astype(np.float16) for c in CAPTIONS]
    source = Fixed({"text_encoder_0": stored})
    own = model.text_encoders[0]
    batch = batches([None, own], source, drop=0.3)(1)
    expected = batches(model.encoders, drop=0.3)(1)
    assert batch["states_0"].dtype == mx.float16
    length = expected["mask_0"].shape[1]
    assert mx.array_equal(batch["mask_0"][:, :length], expected["mask_0"])
    assert mx.allclose(batch["states_0"][:, :length], expected["states_0"], atol=1e-2)
    with pytest.raises(UserError, match="no states of text encoder 0"):
        batches([None, own])(0)
    with pytest.raises(UserError, match="text encoder 0 must be loaded"):
        [batches([None, own], source, drop=0.9, absent=False)(k) for k in range(8)]


# --- training -----------------------------------------------------------------------------------


def test_absent_text_gives_no_gradient_and_no_nan(model):
    batch = batches(model.encoders, drop=1.0)(0)
    assert not batch["mask_0"].any() and not batch["mask_1"].any()
    own, masks = model.text_encoders[0], []
    model.text_encoders = [lambda tokens, mask: masks.append(mask) or own(tokens, mask)]
    states = text_states(model, batch)
    model.text_encoders = [own]
    assert masks[0].any(axis=1).all()  # attention over no token at all is not a number
    assert all(mx.isfinite(s.states).all() for s in states)
    grads, _ = Flow().gradients(model, batch, mx.random.key(0), ElasticStep((0.5,), None))
    for name, value in tree_flatten(grads):
        assert mx.isfinite(value).all(), name


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(train.loop.trainer, "plot_log", lambda run_dir: None)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_frozen_encoders_do_not_change_and_are_in_no_checkpoint(
    model, clip, tmp_path, uncompiled, drop
):
    before = {name: np.array(value) for name, value in tree_flatten(clip.parameters())}
    own = {n: np.array(v) for n, v in tree_flatten(model.text_encoders[0].parameters())}
    assert [e.config.kind for e in model.encoders] == ["clip", "transformer"]
    Trainer(
        model,
        Flow(),
        batches=batches(model.encoders, drop=drop),
        config=TrainingConfig(steps=3, learning_rate=1e-2, warmup_steps=1),
        run_dir=tmp_path,
        arguments=lambda step: ElasticStep((0.5,), None),
    ).run()
    for name, value in tree_flatten(clip.parameters()):
        np.testing.assert_array_equal(np.array(value), before[name], err_msg=name)
    assert any(
        (np.array(v) != own[n]).any() for n, v in tree_flatten(model.text_encoders[0].parameters())
    )
    size = sum(v.size for v in own.values())
    for tree in ("model", "ema"):
        saved = mx.load(str(latest_checkpoint(tmp_path) / f"{tree}.safetensors"))
        assert {n.split(".")[0] for n in saved} == {"transformer", "text_encoders"}
        assert sum(v.size for n, v in saved.items() if n.startswith("text_encoders.")) == size
        assert all(n.startswith("text_encoders.0.") for n in saved if n[:4] == "text")


def test_a_model_of_frozen_encoders_alone_trains(clip):
    transformer = dataclasses.replace(tiny.STUDENT.transformer, text_dims=(32,))
    config = dataclasses.replace(
        tiny.STUDENT, transformer=transformer, text_encoders=(clip.config,)
    )
    model = TextToLatents(config, [None], frozen={0: clip})
    batch = batches(model.encoders, drop=0.3)(0)
    grads, metrics = Flow().gradients(model, batch, mx.random.key(0), ElasticStep((0.5,), None))
    assert grads.keys() == {"transformer"}
    assert metrics["loss"].item() > 0


def test_the_time_shift_follows_the_resolution():
    """Noise levels of 64 latents a side are those of shift 3, of 32 those of shift 1."""
    key = mx.random.key(0)
    for side, shift in ((16, 1.0), (32, 1.0), (64, 1 + 2 / 3), (128, 3.0), (256, 3.0)):
        x0 = mx.zeros((64, side, side, 1))
        assert mx.allclose(noisy(x0, key, shift=None)[1], noisy(x0, key, shift=shift)[1])
    assert not mx.allclose(noisy(x0, key, shift=None)[1], noisy(x0, key, shift=1.0)[1])


def test_the_text_of_a_step_comes_from_both_kinds_of_encoders(model):
    batch, seen = batches(model.encoders)(0), {}

    def loss(text, mask, share, full):
        seen[share] = text.shape, mask.sum().item()
        return text.sum(), (text, {})

    elastic_gradients(model, batch, shares=(0.5,), loss=loss)
    tokens = batch["mask_0"].sum().item() + batch["mask_1"].sum().item()
    shape = (4, 17 + 12, tiny.STUDENT.transformer.text_width)
    assert seen == {1.0: (shape, tokens), 0.5: (shape, tokens)}


def test_noises_and_accumulation_share_pictures():
    """A step of 2 x 2 micro-batches has two batches of pictures, each with two noises."""
    _, tokenizer = own_encoder()
    encoder = TextToLatents(tiny.STUDENT, [tokenizer]).text_encoders[0]
    data = batches([encoder], noises_per_picture=2)
    plain = batches([encoder])
    for number in range(8):
        assert mx.array_equal(data(number)["latents"], plain(number // 2)["latents"])


def test_latents_of_other_autoencoders_are_passed_on():
    _, tokenizer = own_encoder()
    encoder = TextToLatents(tiny.STUDENT, [tokenizer]).text_encoders[0]
    latents, others = mx.zeros((4, 4, 4, 4)), {"teacher": mx.ones((4, 2))}
    source = SimpleNamespace(samples=lambda *_: Samples(latents, CAPTIONS, {}, others))
    assert mx.array_equal(batches([encoder], source)(0)["teacher_latents"], others["teacher"])
