"""The commands from end to end on tiny models: train, distill, export, and what a run records."""

import json
import sys

import mlx.core as mx
import pytest
import sentencepiece

import train.loop.trainer
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import add_lora, get_lora_weights
from mlx_snapgen.lora.files import load_lora, save_lora
from mlx_snapgen.networks.layers import flat_parameters
from tests.tiny import STUDENT
from train import autoencoder, evaluate, export, flow, kd, kdmd, lora, palettes, tokenizer
from train.data.stickers.vocabulary import NOUNS
from train.loop.checkpoint import latest_checkpoint, load_ema
from train.loop.run import claim, find_folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few steps, one preview, no curves; the compiler would take longer than the steps."""
    monkeypatch.setattr(train.loop.trainer, "plot_log", lambda run_dir: None)
    monkeypatch.setattr("train.data.stickers.source.PREVIEW_PROMPTS", ("a cat",))
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def run(monkeypatch):
    def call(command, *options):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, options)])
        command.main()

    return call


@pytest.fixture
def tiny(components, monkeypatch):
    """The default model's sizes are those of a tiny one."""
    config = STUDENT
    for command in (flow, export):
        monkeypatch.setattr(command, "STICKERS", config)
    return config


@pytest.fixture
def flow_options(model_folder, tokenizer_bytes, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes)
    options = ["--autoencoder", model_folder, "--tokenizer", tmp_path / "tokenizer.model"]
    return [*options, "--steps", 1, "--batch-size", 2, "--num-nouns", 20]


def test_flow_trains_and_its_run_is_exported(font, tiny, flow_options, run, tmp_path, capsys):
    made = tmp_path / "run"
    first = ["--run-dir", made, *flow_options, "--categories", "colors", "counting"]
    run(flow, *first, "--mask-ratio", 0.4, "--widths", "full", "small")
    assert "warning: --widths is now --model-widths" in capsys.readouterr().err
    record = json.loads((made / "settings.json").read_text())
    assert record == {"data": "stickers", "num_nouns": 20, "categories": ["colors", "counting"]}
    assert list((made / "samples").iterdir())
    # Another choice of scenes resumes the same run, and other weights start another.
    run(flow, "--run-dir", made, *flow_options, "--steps", 2)
    assert latest_checkpoint(made).name == "step_2"
    run(flow, "--run-dir", tmp_path / "second", *flow_options, "--init-from", made)

    parts = ["--flow", made, "--autoencoder", flow_options[1], "--tokenizer", flow_options[3]]
    run(export, *parts, "--quantize", 0, "--output", tmp_path / "stickers")
    model = load_pretrained(tmp_path / "stickers")
    assert model.vocabulary["nouns"] == [noun.name for noun in NOUNS[:20]]
    assert "Noto Color Emoji" in (tmp_path / "stickers" / "LICENSE").read_text()
    trained = load_ema(made)
    for name, value in flat_parameters(model.transformer).items():
        assert mx.allclose(value, trained[f"transformer.{name}"], atol=1e-2), name

    # A run on other data has neither the words nor the license of the stickers.
    (made / "settings.json").write_text(json.dumps({"data": "folder"}))
    run(export, *parts, "--quantize", 0, "--output", tmp_path / "other")
    assert load_pretrained(tmp_path / "other").vocabulary is None
    assert not (tmp_path / "other" / "LICENSE").exists()
    # Older versions left no record.
    (made / "settings.json").unlink()
    run(export, *parts, "--quantize", 0, "--num-nouns", 30, "--output", tmp_path / "old")
    assert len(load_pretrained(tmp_path / "old").vocabulary["nouns"]) == 30
    with pytest.raises(UserError, match="exists already"):
        run(export, *parts, "--output", tmp_path / "old")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask-ratio", 1], "at least 0 and below 1"),
        (["--distillation-weight", -1], "must not be negative"),
        (["--steps", 0], "--steps must be at least 1"),
        (["--num-nouns", 3], "num_nouns is 3"),
        (["--init-from", "nowhere"], "no model folder nowhere"),
        (["--init-from", "~no-such-user"], "no model folder ~no-such-user"),
        (["--learning-rate", -1], "--learning-rate must lie between 0 and 1"),
        (["--warmup-steps", -1], "--warmup-steps must not be negative"),
        (["--final-learning-rate", -1], "--final-learning-rate must not be negative"),
        (["--ema-decay", 2], "--ema-decay must be at most 1"),
        (["--drop-caption", 2], "--drop-caption must be at most 1"),
        (["--time-shift", 0], "--time-shift must be above 0"),
        (["--seed", 10**14], "is not between"),
        (["--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_of_flow_are_one_line(tiny, flow_options, run, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(flow, "--run-dir", tmp_path / "run", *flow_options, *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (flow, ["--autoencoder", "a", "--tokenizer", "t"]),
        (kd, ["--teacher", "t"]),
        (kdmd, ["--output", "k.safetensors"]),
        (lora, ["--data", "."]),
        (palettes, ["--output", "p"]),
        (autoencoder, []),
    ],
)
def test_a_run_folder_is_no_file(command, options, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/run"):
        with pytest.raises(UserError, match="file is a file, not a folder"):
            run(command, "--run-dir", tmp_path / name, *options)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (kdmd, ["--run-dir", "run", "--output", "{}/k.safetensors"]),
        (lora, ["--data", ".", "--output", "{}/l.safetensors"]),
        (palettes, ["--output", "{}/p"]),
        (export, ["--flow", "f", "--autoencoder", "a", "--tokenizer", "t", "--output", "{}/m"]),
        (evaluate, ["--output", "{}/scores"]),
        (tokenizer, ["--output", "{}/t.model"]),
    ],
)
def test_an_output_that_cannot_be_written_is_found_at_once(command, options, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file, not a folder"):
        run(command, *(option.replace("{}", str(tmp_path / "file")) for option in options))


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (autoencoder, ["--run-dir", "{}/r", "--crop", 60], "multiple of 8 up to 128"),
        (autoencoder, ["--run-dir", "{}/r", "--crop", 256], "multiple of 8 up to 128"),
        (autoencoder, ["--run-dir", "{}/r", "--kl-weight", -1], "must not be negative"),
        (autoencoder, ["--run-dir", "{}/r", "--learning-rate", 0], "must lie between"),
        (tokenizer, ["--output", "{}/t", "--vocab-size", 0], "--vocab-size must be at least 1"),
        (tokenizer, ["--output", "{}/t", "--vocab-size", 2], "no vocabulary of 2 pieces"),
        (evaluate, ["--output", "{}/e", "--model", "nowhere"], "no model folder nowhere"),
        (evaluate, ["--output", "{}/e", "--num-nouns", -1], "num_nouns is -1"),
        (evaluate, ["--output", "{}/e", "--time-shift", 0], "must be above 0"),
        (lora, ["--data", ".", "--rank", 10**6], "--rank must be at most 65536"),
        (lora, ["--data", ".", "--prior-prompts", "no.txt"], "cannot read no.txt"),
    ],
)
def test_a_mistake_leaves_nothing_behind(command, options, message, run, tmp_path):
    with pytest.raises(UserError, match=message):
        run(command, *(str(option).replace("{}", str(tmp_path)) for option in options))
    assert not list(tmp_path.iterdir())


def test_k_dmd_writes_a_lora(font, model_folder, run, tmp_path):
    network = load_pretrained(model_folder).transformer
    mx.random.seed(0)
    add_lora(network, 2, alpha=2.0, targets=["self_attention.*_proj"], name="few_step")
    save_lora(tmp_path / "few.safetensors", network, name="few_step", base_model="random")
    (tmp_path / "prompts.txt").write_text("a red car\ntwo cats\n")
    made = tmp_path / "made.safetensors"
    common = ["--model", model_folder, "--steps", 2, "--student-every", 2, "--batch-size", 2]
    common += ["--rank", 2, "--model-widths", "tiny", "--run-dir", tmp_path / "run"]
    run(kdmd, *common, "--few-step-lora", tmp_path / "few.safetensors", "--output", made)
    assert latest_checkpoint(tmp_path / "run").name == "step_2"
    fresh = load_pretrained(model_folder).transformer
    load_lora(made, fresh, name="student")
    assert set(get_lora_weights(fresh)) == {"student"}
    with pytest.raises(UserError, match="exists already"):
        run(kdmd, *common, "--output", made)
    with pytest.raises(UserError, match=r"ending in \.safetensors"):
        run(kdmd, *common, "--output", tmp_path / "b")
    other = ["--output", tmp_path / "b.safetensors", "--prompts-file", tmp_path / "prompts.txt"]
    with pytest.raises(UserError, match="other data"):
        run(kdmd, *common, *other)


def test_the_tokenizer_has_the_vocabulary_in_whole_words(run, tmp_path, monkeypatch):
    model = tokenizer.train_tokenizer(2048, num_captions=400)
    monkeypatch.setattr(tokenizer, "train_tokenizer", lambda vocab_size: model)
    run(tokenizer, "--output", tmp_path / "made.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "made.model"))
    assert len(processor.encode("apple")) == len(processor.encode("purple")) == 1
    with pytest.raises(UserError, match="exists already"):
        run(tokenizer, "-o", tmp_path / "made.model")


def test_a_run_folder_keeps_its_settings(tmp_path):
    claim(tmp_path / "a", {"rank": 2, "words": 3}, may_change=["words"])
    checkpoint = tmp_path / "a" / "step_1"
    checkpoint.mkdir()
    claim(tmp_path / "a", {"rank": 2, "words": 4}, may_change=["words"])
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["words"] == 4
    with pytest.raises(UserError, match="other rank"):
        claim(tmp_path / "a", {"rank": 3, "words": 4}, may_change=["words"])
    (tmp_path / "a" / "settings.json").unlink()
    with pytest.raises(UserError, match="another kind"):
        claim(tmp_path / "a", {"rank": 2})
    claim(tmp_path / "a", {"rank": 2}, unrecorded={"rank": 2})
    assert find_folder(tmp_path / "a") == tmp_path / "a"
