"""Elastic flow matching: the combined gradient against its definition, term by term."""

import dataclasses
import io

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_snapgen.config import STICKERS, TextEncoderConfig, TransformerConfig
from mlx_snapgen.text_encoder import Tokenizer
from mlx_snapgen.transformer import TextStates
from train.flow import TextToLatents, add_balanced, gradients, sampled_width

TEXT = TextEncoderConfig(vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, max_length=6)
CONFIG = dataclasses.replace(
    STICKERS,
    transformer=TransformerConfig(
        hidden_size=64,
        head_dim=8,
        blocks=(1, 2, 1),
        num_bands=2,
        latent_channels=8,
        text_dims=(16, 16),
        text_width=16,
        frequency_dim=16,
    ),
    text_encoders=(TEXT, TEXT),
)


@pytest.fixture(scope="module")
def model():
    mx.random.seed(0)
    model = TextToLatents(CONFIG, [None, None])
    model.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.parameters()))
    return model


@pytest.fixture(scope="module")
def batch():
    mx.random.seed(1)
    tokens = mx.random.randint(0, 40, (3, 6))
    mask = mx.arange(6)[None] < mx.array([[3], [6], [4]])
    latents = mx.random.normal((3, 4, 4, 8))
    return {
        "latents": latents,
        "tokens_0": tokens,
        "mask_0": mask,
        "tokens_1": tokens,
        "mask_1": mask,
    }


def losses(model, batch, key, width):
    """(L_diff full, L_diff sub + L_dist) by eqs. 4-5, with t and eps drawn as the trainer does."""
    key_t, key_eps = mx.random.split(key)
    t = mx.sigmoid(mx.random.normal((3,), key=key_t))
    eps = mx.random.normal(batch["latents"].shape, key=key_eps)
    s = t.reshape(-1, 1, 1, 1)
    x_t = (1 - s) * batch["latents"] + s * eps
    states = [
        TextStates(e(batch[f"tokens_{i}"], batch[f"mask_{i}"]), batch[f"mask_{i}"])
        for i, e in enumerate(model.text_encoders)
    ]
    text, mask = model.transformer.encode_text(states)
    full = model.transformer(x_t, t, text, mask, 1.0)
    sub = model.transformer(x_t, t, text, mask, width)
    target = eps - batch["latents"]
    distillation = (sub - mx.stop_gradient(full)).square().mean()
    return (full - target).square().mean(), (sub - target).square().mean() + distillation


def flat_grad(model, loss):
    params = model.trainable_parameters()

    def f(p):
        model.update(p)
        return loss()

    grads = dict(tree_flatten(mx.grad(f)(params)))
    model.update(params)
    return grads


@pytest.mark.parametrize("width", [0.5, 0.375])
def test_gradient_is_the_balanced_sum_of_both_losses(model, batch, width):
    key = mx.random.key(3)
    grads, metrics = gradients(model, batch, key, width, 1.0)
    found = dict(tree_flatten(grads))
    full, sub = (flat_grad(model, lambda i=i: losses(model, batch, key, width)[i]) for i in (0, 1))
    assert found.keys() == full.keys()
    # The norms that are balanced: transformer weights and text states.
    states = [
        e(batch[f"tokens_{i}"], batch[f"mask_{i}"]) for i, e in enumerate(model.text_encoders)
    ]
    scale = measured_scale(model, batch, key, width, states)
    for name in full:
        expected = np.array(full[name] + scale * sub[name])
        np.testing.assert_allclose(np.array(found[name]), expected, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(
        float(metrics["loss"]), float(losses(model, batch, key, width)[0]), rtol=1e-5
    )


def measured_scale(model, batch, key, width, states):
    """|g_full| / |g_sub| over the transformer's weights and the text states, from scratch."""
    norms = []
    for i in (0, 1):

        def loss(params, states, i=i):
            model.transformer.update(params)
            encoders = model.text_encoders
            model.text_encoders = [lambda *_, s=s: s for s in states]
            value = losses(model, batch, key, width)[i]
            model.text_encoders = encoders
            return value

        params = model.transformer.trainable_parameters()
        grads = mx.grad(loss, argnums=(0, 1))(params, states)
        model.transformer.update(params)
        norms.append(sum(float(g.square().sum()) for _, g in tree_flatten(grads)) ** 0.5)
    return norms[0] / norms[1]


def test_full_width_alone_is_plain_flow_matching(model, batch):
    key = mx.random.key(4)
    found = dict(tree_flatten(gradients(model, batch, key, 1.0, 1.0)[0]))
    expected = flat_grad(model, lambda: losses(model, batch, key, 0.5)[0])
    for name in expected:
        np.testing.assert_allclose(
            np.array(found[name]), np.array(expected[name]), atol=1e-5, err_msg=name
        )


def test_balanced_sum_has_equal_parts():
    full, sub = {"a": mx.array([3.0, 4.0])}, {"a": mx.array([0.0, 0.1])}
    np.testing.assert_allclose(np.array(add_balanced(full, sub)["a"]), [3, 9], atol=1e-5)


def test_widths_are_sampled_uniformly_and_repeatably():
    drawn = [sampled_width((1.0, 0.5, 0.375), 0, step) for step in range(400)]
    assert drawn == [sampled_width((1.0, 0.5, 0.375), 0, step) for step in range(400)]
    assert set(drawn) == {0.5, 0.375}
    assert 150 < drawn.count(0.5) < 250
    assert sampled_width((1.0,), 0, 0) == 1.0


def test_tokenizer_pads_cuts_and_marks():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red car", "two blue cats", "a dog"] * 5),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
    )
    tokenizer = Tokenizer(model.getvalue(), 8)
    tokens, mask = tokenizer(["", "A  Red CAR", "two blue cats a dog a red car two blue cats"])
    assert tokens.shape == mask.shape == (3, 8)
    assert tokens[0].tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
    assert mask[0].tolist() == [True, True] + [False] * 6
    assert tokenizer.encode("A  Red CAR") == tokenizer.encode("a red car")
    assert bool(mask[2].all()) and tokens[2, -1].item() == 2


def test_checkpoint_names_are_stable(model):
    names = [k for k, _ in tree_flatten(model.parameters())]
    assert "text_encoders.1.layers.0.qkv_proj.weight" in names
    assert "transformer.time.members.2.linear.weight" in names
    assert tree_unflatten([(n, 0) for n in names]).keys() == {"transformer", "text_encoders"}
