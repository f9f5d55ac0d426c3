"""The text encoders of a pipeline: some left out, freed before denoising, remembered."""

import dataclasses
import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest

from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.checkpoint.text_encoders import (
    PromptEncoder,
    encoder_names,
    load_tokenizer,
    new_text_encoder,
)
from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.generate import main
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.networks.efficient_dit import encode_prompts
from mlx_snapgen.networks.text_encoders.base import TextStates, encode_states
from mlx_snapgen.networks.text_encoders.clip import ClipTextEncoder, ClipTokenizer
from mlx_snapgen.networks.text_encoders.sentencepiece import (
    SentencePieceTokenizer,
    TransformerTextEncoder,
)
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.presets import GEMMA_3_4B, TINYCLIP_19M
from tests.tiny import TEXT, tokenizer_bytes
from train.objectives.elastic import TextToLatents


def draw(pipe, prompt="a red apple", **settings):
    return np.array(pipe(prompt, **settings)[0])


def test_names_are_kinds_numbered_where_they_repeat(components):
    assert encoder_names([GEMMA_3_4B, TINYCLIP_19M]) == ["gemma", "clip"]
    assert encoder_names(components.config.text_encoders) == ["transformer-0", "transformer-1"]


# --- absent encoders ----------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [0, 1])
def test_an_absent_encoder_is_one_whose_tokens_are_all_masked(components, absent):
    transformer, encoders = components.transformer, list(components.text_encoders)
    states = encode_states(["a red apple", "cats"], encoders, dtype=mx.float32)
    masked = [
        TextStates(s, mx.zeros_like(m) if i == absent else m) for i, (s, m) in enumerate(states)
    ]
    encoders[absent] = None
    text, mask = encode_prompts(["a red apple", "cats"], encoders, transformer=transformer)
    assert text.shape[1] == (20, 16)[absent]
    x_t, t = mx.random.normal((2, 8, 8, 4), key=mx.random.key(1)), mx.array([0.5, 0.9])
    expected = transformer(x_t, t, *transformer.encode_text(masked))
    assert mx.allclose(transformer(x_t, t, text, mask), expected, atol=1e-5)
    whole = transformer(x_t, t, *transformer.encode_text(states))
    assert not mx.allclose(whole, expected, atol=1e-3)


def test_without_any_encoder_nothing_is_drawn(components):
    with pytest.raises(UserError, match="at least one is needed"):
        encode_prompts(["a"], [None, None], transformer=components.transformer)


def test_only_the_chosen_encoders_are_loaded(model_folder, tmp_path):
    (folder := tmp_path / "m").mkdir()
    for path in model_folder.iterdir():
        if path.name != "text_encoder_0.safetensors":
            (folder / path.name).symlink_to(path)
    pipe = SnapGenPipeline.from_pretrained(folder, text_encoders=["transformer-1"])
    assert pipe.text_encoders[0] is None
    assert pipe.describe()["text_encoders"] == ["transformer-1"]
    both = SnapGenPipeline.from_pretrained(model_folder)
    assert both.describe()["text_encoders"] is None
    assert not np.array_equal(draw(pipe), draw(both))
    with pytest.raises(UserError, match="load the model with all of them"):
        pipe.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("names", "message"),
    [(["transfomer-1"], "did you mean 'transformer-1'"), ([], "choose at least one"), ([3], "'3'")],
)
def test_names_that_are_not_there(model_folder, names, message):
    with pytest.raises(UserError, match=message):
        load_pretrained(model_folder, text_encoders=names)


def test_the_command_takes_names_and_the_picture_keeps_them(model_folder, tmp_path):
    out = tmp_path / "a.png"
    options = ["--model", str(model_folder), "--seed", "3", "--output"]
    main(["an apple", *options, str(out), "--text-encoders", "transformer-0"])
    assert read_metadata(out)["text_encoders"] == ["transformer-0"]
    main(["--config-from-image", str(out), "--trust-settings", "--output", str(tmp_path / "b.png")])
    assert read_metadata(tmp_path / "b.png")["text_encoders"] == ["transformer-0"]
    assert (tmp_path / "b.png").read_bytes() == out.read_bytes()
    main(["an apple", *options, str(tmp_path / "c.png"), "--keep-text-encoders"])
    assert (tmp_path / "c.png").read_bytes() != out.read_bytes()


# --- freed and remembered -----------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_encoders_leave_memory_before_the_first_step_unless_kept(model_folder, keep):
    pipe = SnapGenPipeline.from_pretrained(model_folder, keep_text_encoders=keep)
    there = [weakref.ref(encoder) for encoder in pipe.text_encoders]
    steps = pipe.generate("a red apple")
    next(steps)
    gc.collect()
    assert [ref() is not None for ref in there] == [keep, keep]
    assert len(pipe.text_encoders) == 2  # there again when asked for


def test_freed_encoders_are_loaded_for_new_prompts_alone(components):
    loads, calls = [], []

    class Recording:
        def __init__(self, encoder):
            self.tokenizer, self.encoder = encoder.tokenizer, encoder

        def tokenize(self, prompts):
            calls.extend(prompts)
            return self.encoder.tokenize(prompts)

        def __call__(self, tokens, mask):
            return self.encoder(tokens, mask)

    def load():
        loads.append(1)
        return [Recording(encoder) for encoder in components.text_encoders]

    prompts = PromptEncoder(load(), load, cache_size=2)

    def say(*texts):
        text, mask = prompts(texts, components.transformer)
        prompts.free()
        expected = encode_prompts(
            texts, components.text_encoders, transformer=components.transformer
        )
        assert mx.allclose(text, expected[0], atol=1e-5)
        assert mx.array_equal(mask, expected[1])

    say("", "a red apple")
    say("", "a red apple")
    say("a red apple", "a red apple")
    assert len(loads) == 1
    assert calls == [""] * 2 + ["a red apple"] * 2
    say("", "a blue car")  # the red apple is forgotten
    assert len(loads) == 2
    say("", "a blue car")
    assert len(loads) == 2
    say("a red apple")
    assert len(loads) == 3


def test_states_do_not_depend_on_what_is_remembered(components):
    one, other = (PromptEncoder(components.text_encoders) for _ in range(2))
    one(["", "a red apple", "cats"], components.transformer)
    other(["a red apple"], components.transformer)
    a, _ = one(["a red apple", ""], components.transformer)
    b, _ = other(["a red apple", ""], components.transformer)
    assert mx.array_equal(a, b)


def test_pictures_are_the_same_freed_or_kept(model_folder):
    freed = SnapGenPipeline.from_pretrained(model_folder)
    kept = SnapGenPipeline.from_pretrained(model_folder, keep_text_encoders=True)
    for prompt in ("a red apple", "a blue cat", "a red apple"):
        assert np.array_equal(draw(freed, prompt), draw(kept, prompt))


def test_a_model_given_in_memory_keeps_its_encoders(components, tmp_path):
    pipe = SnapGenPipeline(components)
    next(pipe.generate("a red apple"))
    assert pipe.text_encoders[0] is components.text_encoders[0]
    save_pretrained(tmp_path / "m", pipe.components)


def test_trainers_build_each_kind_of_encoder_and_tokenizer(components, tmp_path):
    (tmp_path / "merges").write_bytes(b"a p\nap p")
    clip = TextEncoderConfig(kind="clip", vocab_size=516, hidden_size=32, num_heads=2)
    tokenizer = load_tokenizer(tmp_path / "merges", clip)
    assert isinstance(tokenizer, ClipTokenizer)
    assert tokenizer.max_length == clip.max_length
    assert type(new_text_encoder(clip, tokenizer)) is ClipTextEncoder
    config = dataclasses.replace(components.config, text_encoders=(clip, TEXT))
    own = SentencePieceTokenizer(tokenizer_bytes(), TEXT.max_length)
    trained = TextToLatents(config, [tokenizer, own])
    assert [type(e) for e in trained.text_encoders] == [TransformerTextEncoder]
    assert trained.encoders == [None, trained.text_encoders[0]]
    with pytest.raises(UserError, match="has 516 tokens, its text encoder 500"):
        load_tokenizer(tmp_path / "merges", dataclasses.replace(clip, vocab_size=500))
    for other in (dataclasses.replace(clip, kind="gemma"), dataclasses.replace(clip, source="x")):
        with pytest.raises(UserError, match="is loaded from its source"):
            new_text_encoder(other, tokenizer)
