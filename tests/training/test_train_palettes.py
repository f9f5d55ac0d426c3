"""Fine-tuning under palettes: biases and norms learn, palettes stay, and the export gets both."""

import dataclasses
import shlex
import sys

import mlx_snapgen  # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from convert.coreml.options import check_palettes_fit, parse_bits
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.draw import draw_latents
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import add_lora
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.quantize.palettes import check_palettes, load_palettes, with_palettes
from train import palettes
from train.data import trajectories
from train.evaluation import palettes as comparison
from train.evaluation.palettes import compare
from train.loop.checkpoint import read_log
from train.loop.palettes import load_alone
from train.options import palettes as palettes_options

TWO = ["--model-widths", "full", "small", "--steps", "30", "--checkpoint-every", "15"]
PROMPTS = [f"a {color} {noun}" for color in ("red", "blue", "green") for noun in ("car", "cat")]


@pytest.fixture(scope="module")
def model(components, tmp_path_factory):
    """`components` on disk with two widths of three in use, and prompts beside them."""
    folder = tmp_path_factory.mktemp("model") / "model"
    save_pretrained(folder, components, texts={"LICENSE": "mine"})
    (folder.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(scope="module")
def tuned(model):
    """The model after a run over two widths, interrupted and resumed."""
    folder = model.parent / "tuned"
    run(model, folder, *TWO)
    return folder


def run(model, output, *options):
    prompts = model.parent / "prompts.txt"
    fixed = ["--prompts-file", prompts, "--pictures", "6", "--run-dir", output.parent / "run"]
    fixed += ["--batch-size", "8", "--quantize", "4.5", "--model", model, "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(palettes, "HELD_OUT", 2)
        patch.setattr(palettes_options, "HELD_OUT", 2)
        patch.setattr(sys, "argv", ["palettes", *map(str, fixed), *options])
        mx.disable_compile()  # few steps are done long before the compiler is
        try:
            palettes.main()
        finally:
            mx.enable_compile()


def flat(module):
    return dict(tree_flatten(module.parameters()))


def is_trained(name):
    last = name.rpartition(".")[2]
    return not name.startswith("text.") and (last == "bias" or "_norm.members" in name)


def test_only_biases_and_norms_change(components, tuned):
    plan = load_palettes(tuned)
    before = flat(with_palettes(components.transformer, plan.bits))
    after = flat(load_pretrained(tuned).transformer)
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and all(map(is_trained, changed))
    # What belongs to the third width alone had nothing to learn.
    used = {n for n in before if is_trained(n) and ".members.2." not in n}
    # A key's bias in front of a norm is a part of what it learns; none is left out.
    assert changed == used
    check_palettes(load_pretrained(tuned).transformer, plan)
    assert plan.widths == ["full", "small"]
    assert (tuned / "LICENSE").read_text() == "mine"


def test_the_velocity_comes_nearer(model, tuned):
    log = read_log(tuned.parent / "run")
    assert [line["step"] for line in log if "psnr_small" in line] == [15, 30]
    table = (tuned.parent / "run" / "table.md").read_text().splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert [row[1] for row in rows[:4]] == [
        "float32",
        "fp16",
        "4.5 bits, palettes alone",
        "4.5 bits, fine-tuned",
    ]
    assert {row[0] for row in rows} == {"full", "small"}
    for group in (rows[:4], rows[4:]):
        half, alone, fine = (float(row[2]) for row in group[1:])
        assert alone + 1 < fine < half
        assert half > 50


def test_the_command_says_what_is_wrong_and_resumes(model, tuned, tmp_path, capsys):
    with pytest.raises(UserError, match="exists already"):
        run(model, tuned)
    with pytest.raises(UserError, match="holds a run with other"):
        run(model, tuned.parent / "other", "--quantize", "5")
    for options, message in (
        (["--bits", "3"], "4 to 8"),
        (["--model-widths", "full", "full"], "named twice"),
        (["--pictures", "2"], "must be above"),
        (["--steps", "0"], "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            run(model, tmp_path / "out", *options)
    # The run is finished: the same model once more, with nothing learned.
    again = tuned.parent / "once more"
    again.mkdir()
    capsys.readouterr()
    run(model, again, *TWO)
    training, export, command, *table = capsys.readouterr().out.splitlines()
    assert training.startswith("training ")
    assert export == f"{again} is complete. To export it:"
    assert shlex.split(command)[2:] == ["convert.coreml", str(again), f"{again}-coreml"]
    assert table == (tuned.parent / "run" / "table.md").read_text().splitlines()
    first, second = (flat(load_pretrained(folder).transformer) for folder in (tuned, again))
    assert all(mx.array_equal(first[name], second[name]) for name in first)


def test_trajectories_are_what_the_model_says_on_its_way(components):
    data = trajectories.Trajectories(
        components, PROMPTS, [1.0, 0.5], batch_size=4, share_of=lambda n: 0.5
    )
    steps = components.config.sampler.num_inference_steps
    for width in (1.0, 0.5):
        states = data.states[width]
        # With guidance each step asks for the empty prompt and the prompt.
        assert len(states["t"]) == len(PROMPTS) * steps * 2
        assert sorted(set(states["prompt"].tolist())) == list(range(len(PROMPTS) + 1))
        assert data.error(components.transformer, width) < 1e-8
    assert data.error(components.transformer, 1.0) < 1e-8
    first, again = data(3), data(3)
    assert all(mx.array_equal(first[name], again[name]) for name in first)
    v = components.transformer(first["x_t"], first["t"], first["text"], first["mask"], share=0.5)
    np.testing.assert_allclose(v, first["v"], atol=1e-5)
    assert not mx.array_equal(first["x_t"], data(4)["x_t"])
    mine = draw_latents(components, PROMPTS[:2], seeds=[0, 1], share=0.5)
    last = data.rows(data.states[0.5], [0])
    assert mine.shape == (2, *last["x_t"].shape[1:])


def test_a_few_step_model_learns_its_own_steps(components, model, tmp_path, monkeypatch):
    """Its LoRA is fused, for the palettes are those of the sum."""
    alone = load_alone(model, ["small"])
    assert alone.transformer.config.widths == (1.0,)
    assert alone.config.sampler == components.config.sampler
    made = load_pretrained(model)
    mx.random.seed(1)
    add_lora(made.transformer, 2, alpha=2.0, targets=["q_proj"], name="few_step")
    four = dataclasses.replace(made.config.sampler, num_inference_steps=4, fresh_noise=True)
    made.config = dataclasses.replace(made.config, few_step=four)
    save_pretrained(tmp_path / "few", made)
    fused = load_alone(tmp_path / "few", ["full", "small"])
    assert (fused.config.sampler, fused.config.few_step) == (four, None)
    assert flat(fused.transformer).keys() == flat(components.transformer).keys()


def test_a_picture_that_turns_into_another_does_not_decide(components, monkeypatch):
    expected = mx.arange(12.0).reshape(3, 2, 2, 1)
    moved = expected + mx.array([0.01, 0.01, 5.0]).reshape(3, 1, 1, 1)
    other = EfficientDiT(components.config.transformer)
    monkeypatch.setattr(
        comparison,
        "draw_latents",
        lambda *args, network=None, **_: moved if network is other else expected,
    )
    monkeypatch.setattr(comparison, "velocity_psnr", lambda *_, **__: {"full": 30.0})
    table = compare(components, {"tuned": other}, None, captions=PROMPTS[:3], widths={"full": 1.0})
    assert table.splitlines()[-1] == f"| full | tuned | 30.0 | {20 * np.log10(11 / 0.01):.1f} |"


def test_the_export_takes_these_palettes_and_no_others(tuned):
    plan, config = load_palettes(tuned), load_pretrained(tuned).config
    assert parse_bits(None, plan) == parse_bits("4.5", plan) == 4.5
    assert parse_bits("none", plan) is None
    assert parse_bits(None, None) is None
    with pytest.raises(UserError, match=r"palettes of 4\.5 bits on average, not 4\.3"):
        parse_bits("4.3", plan)
    check_palettes_fit(plan, config, widths=["full", "small"], prompts=None)
    with pytest.raises(UserError, match="the palettes are for full and small, not tiny"):
        check_palettes_fit(plan, config, widths=["full", "tiny"], prompts=None)
    with pytest.raises(UserError, match="leave out --prompts"):
        check_palettes_fit(plan, config, widths=["full"], prompts=["a cat"])
