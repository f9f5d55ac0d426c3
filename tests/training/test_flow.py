"""Elastic flow matching: the combined gradient against its definition, term by term."""

import dataclasses
import io
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import sentencepiece
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import train.loop.trainer
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks import layers
from mlx_snapgen.networks.elastic import ElasticLinear
from mlx_snapgen.networks.text_encoders.base import TextStates
from mlx_snapgen.networks.text_encoders.sentencepiece import SentencePieceTokenizer
from tests import tiny
from train.data.encoded import EncodedBatches, EncodedPictures
from train.data.stickers.model import STICKERS
from train.data.stickers.source import Stickers
from train.loop.checkpoint import read_log, save_checkpoint
from train.loop.config import TrainingConfig
from train.loop.optimizer import Optimizers, Role
from train.loop.run import start_from
from train.loop.trainer import Trainer
from train.objectives.elastic import (
    EARLY,
    ElasticStep,
    TextToLatents,
    add_balanced,
    noisy,
    sampled_shares,
)
from train.objectives.flow import Flow, kept_tokens

TEXT = dataclasses.replace(tiny.TEXT, vocab_size=40, max_length=6)
CONFIG = dataclasses.replace(
    STICKERS,
    transformer=dataclasses.replace(
        tiny.TRANSFORMER, latent_channels=8, text_dims=(16, 16), text_width=16, frequency_dim=16
    ),
    text_encoders=(TEXT, TEXT),
)


def gradients(model, batch, key, shares, mask_ratio=0.0, weight=1.0):
    return Flow(mask_ratio, weight).gradients(model, batch, key, ElasticStep(shares, 1.0))


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


def losses(model, batch, key, width, weight=1.0):
    """(L_diff full, L_diff sub + weight L_dist) by eqs. 4-5, t and eps drawn as in training."""
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
    full = model.transformer(x_t, t, text, mask, share=1.0)
    sub = model.transformer(x_t, t, text, mask, share=width)
    target = eps - batch["latents"]
    distillation = (sub - mx.stop_gradient(full)).square().mean()
    return (full - target).square().mean(), (sub - target).square().mean() + weight * distillation


def flat_grad(model, loss):
    params = model.trainable_parameters()

    def f(p):
        model.update(p)
        return loss()

    grads = dict(tree_flatten(mx.grad(f)(params)))
    model.update(params)
    return grads


@pytest.mark.parametrize(("width", "weight"), [(0.5, 1.0), (0.375, 1.0), (0.375, 4.0)])
def test_gradient_is_the_balanced_sum_of_both_losses(model, batch, width, weight):
    key = mx.random.key(3)
    grads, metrics = gradients(model, batch, key, (width,), weight=weight)
    found = dict(tree_flatten(grads))
    full, sub = (
        flat_grad(model, lambda i=i: losses(model, batch, key, width, weight)[i]) for i in (0, 1)
    )
    assert found.keys() == full.keys()
    # The norms that are balanced: transformer weights and text states.
    states = [
        e(batch[f"tokens_{i}"], batch[f"mask_{i}"]) for i, e in enumerate(model.text_encoders)
    ]
    scale = measured_scale(model, batch, key, width, weight, states)
    for name in full:
        expected = np.array(full[name] + scale * sub[name])
        np.testing.assert_allclose(np.array(found[name]), expected, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(
        float(metrics["loss"]), float(losses(model, batch, key, width)[0]), rtol=1e-5
    )


def measured_scale(model, batch, key, width, weight, states):
    """|g_full| / |g_sub| over the transformer's weights and the text states, from scratch."""
    norms = []
    for i in (0, 1):

        def loss(params, states, i=i):
            model.transformer.update(params)
            encoders = model.text_encoders
            model.text_encoders = [lambda *_, s=s: s for s in states]
            value = losses(model, batch, key, width, weight)[i]
            model.text_encoders = encoders
            return value

        params = model.transformer.trainable_parameters()
        grads = mx.grad(loss, argnums=(0, 1))(params, states)
        model.transformer.update(params)
        norms.append(sum(float(g.square().sum()) for _, g in tree_flatten(grads)) ** 0.5)
    return norms[0] / norms[1]


@pytest.mark.parametrize("shares", [(), (0.5,)])
def test_gradients_are_laid_out_as_the_weights(model, batch, shares):
    """By itself the gradient of x W^T is a transposed view, slow to add and to update with."""
    found, _ = gradients(model, batch, mx.random.key(0), shares)
    found = dict(tree_flatten(found))
    linear = {k: m for k, m in model.named_modules() if isinstance(m, ElasticLinear)}
    assert linear
    assert all(memoryview(found[f"{name}.weight"]).c_contiguous for name in linear)


def test_weights_are_those_of_the_channels(model, batch):
    """A loss that weighs one channel alone has no gradient with respect to the others' output."""
    key, step = mx.random.key(0), ElasticStep((0.5,), 1.0)
    weights = 8.0 * (mx.arange(8) == 3)
    grads, metrics = Flow(weights=weights).gradients(model, batch, key, step)
    _, plain = Flow().gradients(model, batch, key, step)
    assert all(abs(metrics[k].item() - plain[k].item()) > 1e-3 for k in ("loss", "loss_0.5"))
    rows = grads["transformer"]["head"]["linear"]["bias"].reshape(-1, 8).T
    assert rows[3].abs().min().item() > 0
    assert mx.all(rows[:3] == 0).item() and mx.all(rows[4:] == 0).item()


def test_two_sub_networks_in_a_step_are_each_balanced(model, batch):
    """What a second sub-network adds does not depend on the first."""
    key = mx.random.key(3)

    def found(*widths):
        return dict(tree_flatten(gradients(model, batch, key, widths)[0]))

    alone, first, second, both = found(), found(0.5), found(0.375), found(0.5, 0.375)
    for name in alone:
        expected = first[name] + second[name] - alone[name]
        np.testing.assert_allclose(
            np.array(both[name]), np.array(expected), atol=2e-5, err_msg=name
        )
    metrics = gradients(model, batch, key, (0.5, 0.375))[1]
    assert {"loss", "loss_0.5", "loss_0.375", "distillation_0.375"} <= metrics.keys()


def test_full_width_alone_is_plain_flow_matching(model, batch):
    key = mx.random.key(4)
    found = dict(tree_flatten(gradients(model, batch, key, ())[0]))
    expected = flat_grad(model, lambda: losses(model, batch, key, 0.5)[0])
    for name in expected:
        np.testing.assert_allclose(
            np.array(found[name]), np.array(expected[name]), atol=1e-5, err_msg=name
        )


@pytest.fixture
def uncompiled():
    """Few steps are done long before the compiler is."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def even_batch(batch):
    return {name: mx.concatenate([rows, rows[:1]]) for name, rows in batch.items()}


def test_a_compiled_step_may_compute_attention_in_parts(monkeypatch):
    """The text encoders run twice in a step; `mx.compile` must not merge the parts of queries."""
    monkeypatch.setattr(layers, "PART_OF_SCORES", 1)
    text = dataclasses.replace(TEXT, max_length=24)
    mx.random.seed(2)
    long = TextToLatents(dataclasses.replace(CONFIG, text_encoders=(text,) * 2), [None, None])
    long.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), long.parameters()))
    tokens, mask = mx.random.randint(0, 40, (2, 24)), mx.arange(24)[None] < mx.array([[3], [24]])
    inputs = {"latents": mx.random.normal((2, 4, 4, 8))}
    inputs |= {f"{name}_{i}": x for i in (0, 1) for name, x in (("tokens", tokens), ("mask", mask))}

    def step(inputs, key):
        return gradients(long, inputs, key, (0.5,))

    key = mx.random.key(0)
    expected, _ = step(inputs, key)
    found, _ = mx.compile(step, inputs=[long.state])(inputs, key)
    for (name, a), (_, b) in zip(tree_flatten(found), tree_flatten(expected), strict=True):
        assert mx.allclose(a, b, rtol=1e-3, atol=1e-5).item(), name


def test_a_share_of_the_noise_levels_is_early(even_batch):
    x0, key = mx.repeat(even_batch["latents"][:1], 4000, axis=0), mx.random.key(3)
    _, usual, _ = noisy(x0, key, shift=1.0)
    x_t, t, v = noisy(x0, key, shift=1.0, early=0.25)
    early = t != usual
    assert 0.22 < early.mean().item() < 0.28
    levels = np.sort(np.array(t)[np.array(early)])
    assert levels[0] > EARLY and levels[-1] <= 1
    assert abs((1 - levels).mean() - (1 - EARLY) / 3) < 0.005
    assert mx.allclose(x_t, x0 + t[:, None, None, None] * v, atol=1e-5)


def test_masking_weighs_whole_and_masked_scenes_alike(model, even_batch):
    """Each half goes through the network by itself here; the losses and noise are eq. 4's."""
    key = mx.random.key(5)
    grads, metrics = gradients(model, even_batch, key, (), 0.4)
    x_t, t, v = noisy(even_batch["latents"], key, shift=1.0)
    keep = kept_tokens(4, 4, ratio=0.4, key=mx.random.split(key, 3)[2])
    assert not keep[2:].all()

    def half(rows, keep):
        states = [
            TextStates(
                e(even_batch[f"tokens_{i}"][rows], even_batch[f"mask_{i}"][rows]),
                even_batch[f"mask_{i}"][rows],
            )
            for i, e in enumerate(model.text_encoders)
        ]
        text, mask = model.transformer.encode_text(states)
        predicted = model.transformer(x_t[rows], t[rows], text, mask, keep=keep)
        return (predicted - v[rows]).square().mean()

    def whole():
        return half(slice(0, 2), None)

    def masked():
        return half(slice(2, 4), keep[2:])

    assert float(metrics["loss"]) == pytest.approx(float(whole()), rel=1e-5)
    assert float(metrics["masked"]) == pytest.approx(float(masked()), rel=1e-5)
    assert float(masked()) != pytest.approx(float(half(slice(2, 4), None)), rel=1e-4)
    expected = flat_grad(model, lambda: (whole() + masked()) / 2)
    found = dict(tree_flatten(grads))
    for name in expected:
        np.testing.assert_allclose(
            np.array(found[name]), np.array(expected[name]), atol=1e-5, err_msg=name
        )


def test_of_an_odd_batch_the_larger_part_is_whole(model, batch):
    key = mx.random.key(5)
    metrics = gradients(model, batch, key, (), 0.4)[1]
    x_t, t, v = noisy(batch["latents"], key, shift=1.0)
    keep = kept_tokens(3, 4, ratio=0.4, key=mx.random.split(key, 3)[2])
    states = [
        TextStates(e(batch[f"tokens_{i}"], batch[f"mask_{i}"]), batch[f"mask_{i}"])
        for i, e in enumerate(model.text_encoders)
    ]
    text, mask = model.transformer.encode_text(states)
    predicted = model.transformer(x_t, t, text, mask, keep=keep)
    whole, masked = (
        float((predicted - v)[rows].square().mean()) for rows in (slice(2), slice(2, 3))
    )
    assert float(metrics["loss"]) == pytest.approx(whole, rel=1e-5)
    assert float(metrics["masked"]) == pytest.approx(masked, rel=1e-5)


def test_masking_leaves_noise_and_other_half_alone(model, even_batch):
    key = mx.random.key(6)
    masked = gradients(model, even_batch, key, (0.5,), 0.4)[1]
    assert masked.keys() == {"loss", "masked", "loss_0.5", "masked_0.5", "distillation_0.5"}
    half = {name: rows[:2] for name, rows in even_batch.items()}
    x_t, t, v = (x[:2] for x in noisy(even_batch["latents"], key, shift=1.0))
    states = [
        TextStates(e(half[f"tokens_{i}"], half[f"mask_{i}"]), half[f"mask_{i}"])
        for i, e in enumerate(model.text_encoders)
    ]
    text, mask = model.transformer.encode_text(states)
    expected = (model.transformer(x_t, t, text, mask, share=0.5) - v).square().mean()
    assert float(masked["loss_0.5"]) == pytest.approx(float(expected), rel=1e-5)


def test_masked_share():
    keep = np.array(kept_tokens(101, 256, ratio=0.45, key=mx.random.key(0)))
    assert keep[:51].all()
    assert keep[51:].mean() == pytest.approx(0.55, abs=0.02)
    assert keep[51:].mean(1).std() > 0.01 and keep[51:].mean(0).std() > 0.01
    with pytest.raises(UserError, match="two samples"):
        kept_tokens(1, 256, ratio=0.45, key=mx.random.key(0))


def test_masked_training_learns(even_batch, tmp_path, monkeypatch, uncompiled):
    """The same scenes again and again: the whole ones' loss and the masked ones' both fall."""
    monkeypatch.setattr(train.loop.trainer, "plot_log", lambda run_dir: None)
    mx.random.seed(0)
    transformer = dataclasses.replace(
        CONFIG.transformer, hidden_size=32, head_dim=4, blocks=(1, 1, 1)
    )
    model = TextToLatents(dataclasses.replace(CONFIG, transformer=transformer), [None, None])
    Trainer(
        model,
        Flow(mask_ratio=0.45),
        batches=lambda k: even_batch,
        config=TrainingConfig(steps=30, learning_rate=2e-2, warmup_steps=3, log_every=5),
        run_dir=tmp_path,
        arguments=lambda step: ElasticStep((), 1.0),
    ).run()
    log = [entry for entry in read_log(tmp_path) if "masked" in entry]
    for name in ("loss", "masked"):
        assert log[-1][name] < 0.75 * log[0][name], name


def test_weights_of_another_model_are_refused(model, tmp_path):
    trees = {name: {} for name in ("model", "optimizer")} | {"ema": model.parameters()}
    save_checkpoint(tmp_path, trees, state={"step": 1}, keep=0)
    same = TextToLatents(CONFIG, [None, None])
    start_from(same, tmp_path)
    for (name, a), (_, b) in zip(
        tree_flatten(same.parameters()), tree_flatten(model.parameters()), strict=True
    ):
        np.testing.assert_array_equal(np.array(a), np.array(b), err_msg=name)
    transformer = dataclasses.replace(CONFIG.transformer, blocks=(1, 2, 2))
    other = TextToLatents(dataclasses.replace(CONFIG, transformer=transformer), [None, None])
    with pytest.raises(UserError, match=r"lacks transformer\.up_blocks\.1"):
        start_from(other, tmp_path)


def test_balanced_sum_has_equal_parts():
    full, sub = {"a": mx.array([3.0, 4.0])}, {"a": mx.array([0.0, 0.1])}
    np.testing.assert_allclose(np.array(add_balanced(full, sub)["a"]), [3, 9], atol=1e-5)
    third = {"a": mx.array([20.0, 0.0])}
    np.testing.assert_allclose(np.array(add_balanced(full, sub, third)["a"]), [8, 9], atol=1e-5)


def test_norms_of_bfloat16_gradients_are_float32():
    """Each part is a thousand arrays whose squares a bfloat16 sum would stop adding at 256."""
    full = {str(i): mx.ones((1,), mx.bfloat16) for i in range(1000)}
    sub = {name: (mx.ones if name == "0" else mx.zeros)((1,), mx.bfloat16) for name in full}
    total = add_balanced(full, sub)
    assert {g.dtype for g in total.values()} == {mx.bfloat16}
    assert total["0"].item() == pytest.approx(1 + 1000**0.5, rel=4e-3)
    optimizers = Optimizers(TrainingConfig(steps=1, max_grad_norm=1.0), [Role("model")])
    model = nn.Module()
    for name, value in full.items():
        model[name] = value
    optimizers.init(model.trainable_parameters())
    norms = optimizers.update(model, full, step=mx.array(0))
    assert norms["grad_norm"].item() == pytest.approx(1000**0.5, rel=1e-5)


def test_widths_are_sampled_uniformly_and_repeatably():
    drawn = [sampled_shares((1.0, 0.5, 0.375), seed=0, step=step) for step in range(400)]
    assert drawn == [sampled_shares((1.0, 0.5, 0.375), seed=0, step=step) for step in range(400)]
    assert set(drawn) == {(0.5,), (0.375,)}
    assert 150 < drawn.count((0.5,)) < 250
    assert sampled_shares((1.0,), seed=0, step=0) == ()
    for step in range(4):
        assert sampled_shares((1.0, 0.5, 0.375), seed=0, step=step, count=2) == (0.5, 0.375)


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
    tokenizer = SentencePieceTokenizer(model.getvalue(), 8)
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


def test_micro_batches_of_a_step_share_their_scenes(components, font, monkeypatch):
    source = EncodedPictures(Stickers(0, 20), components.autoencoder)

    def encoded(**more):
        return EncodedBatches(
            source,
            components.text_encoders,
            batch_size=2,
            seed=0,
            drop_caption=0.0,
            **more,
        )

    data, plain = encoded(noises_per_picture=2), encoded()

    def scenes(data, numbers):
        return [data(k)["latents"] for k in numbers]

    ours, theirs = scenes(data, range(6)), scenes(plain, range(3))
    for number, latents in enumerate(ours):
        assert mx.array_equal(latents, theirs[number // 2])
    assert not mx.array_equal(theirs[0], theirs[1])
    # Of two processes each has two batches of its own in step 0: numbers 0 and 2, 1 and 3.
    monkeypatch.setattr(mx.distributed, "init", lambda: SimpleNamespace(size=lambda: 2))
    first, second = scenes(data, (0, 2)), scenes(data, (1, 3))
    assert mx.array_equal(first[0], first[1]) and mx.array_equal(first[0], theirs[0])
    assert mx.array_equal(second[0], second[1]) and mx.array_equal(second[0], theirs[1])
    for number, latents in enumerate(theirs):
        assert mx.array_equal(data(data.first_of(number))["latents"], latents)
    assert [plain.first_of(k) for k in range(6)] == list(range(6))
