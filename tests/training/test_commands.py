"""The commands from end to end on tiny models: train, distill, export, and what a run records."""

import dataclasses
import json

import mlx.core as mx
import pytest
import sentencepiece
from PIL import Image

from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.config import SamplerConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.lora.adapters import add_lora, get_lora_weights
from mlx_snapgen.lora.files import few_step_sampler, load_lora, read_lora, save_lora
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.presets import FOUR_STEPS
from tests.tiny import MODEL, make_components, randomize
from train import autoencoder, evaluate, export, flow, kd, kdmd, lora, palettes, tokenizer
from train.data.stickers.vocabulary import NOUNS
from train.loop.checkpoint import latest_checkpoint, load_ema, read_log
from train.loop.run import claim, find_folder


@pytest.fixture(autouse=True)
def few_previews(quick, monkeypatch):
    monkeypatch.setattr("train.data.stickers.source.PREVIEW_PROMPTS", ("a cat",))


@pytest.fixture
def flow_options(model_folder):
    options = ["--model", model_folder, "--steps", 1, "--batch-size", 2]
    return [*options, "--validation-prompts", "a cat", "--validation-pictures", 2]


def test_flow_trains_and_its_run_is_exported(
    font, model_folder, flow_options, run, tmp_path, capsys
):
    made, data = tmp_path / "run", ["--data", "stickers:nouns=20"]
    first = ["--run-dir", made, *flow_options, "--data"]
    first.append("stickers:nouns=20,categories=colors+counting")
    run(flow, *first, "--mask-ratio", 0.4, "--widths", "full", "small")
    assert "warning: --widths is now --model-widths" in capsys.readouterr().err
    record = json.loads((made / "settings.json").read_text())
    assert record == {
        "data": "stickers",
        "num_nouns": 20,
        "categories": ["colors", "counting"],
        "model": str(model_folder),
        "model_name": "random",
        "image_size": list(MODEL.image_size),
        "trained_sizes": [list(MODEL.image_size)],
        "time_shift": MODEL.sampler.time_shift,
        "noises_per_picture": 1,
        "options": {
            "drop_caption": 0.1,
            "time_shift": MODEL.sampler.time_shift,
            "early_share": 0.0,
            "model_widths": ["full", "small"],
            "sub_networks": 1,
            "init_from": None,
            "channel_weights": 0.0,
            "mask_ratio": 0.4,
            "distillation_weight": 1.0,
        },
    } | {name: record[name] for name in ("autoencoder_digest", "tokenizer_digests", "networks")}
    networks = MODEL.transformer, *MODEL.text_encoders
    assert record["networks"] == [to_dict(config) for config in networks]
    assert [len(digest) for digest in record["tokenizer_digests"]] == [32, 32]
    assert list((made / "samples").iterdir())
    assert {"validation_full", "validation_small"} <= read_log(made)[-1].keys()
    # The same number of micro-batches, but of other pictures.
    more = [*data, "--steps", 4, "--noises-per-picture"]
    run(flow, "--run-dir", tmp_path / "split", *flow_options, *more, 2, "--accumulate", 2)
    with pytest.raises(UserError, match="holds a run with other --noises-per-picture"):
        run(flow, "--run-dir", tmp_path / "split", *flow_options, *more, 1, "--accumulate", 4)
    # A model of the same sizes.
    other = make_components()
    randomize(other.autoencoder, 5)
    other.text_encoders[0].tokenizer.model += b"\xc0\x3e\x01"  # an unknown field
    save_pretrained(tmp_path / "other-model", other)
    more = ["--model", tmp_path / "other-model", "--steps", 2]
    message = "holds a run with other weights of the autoencoder and tokenizers: give another"
    with pytest.raises(UserError, match=message):
        run(flow, "--run-dir", made, *flow_options, *data, *more)
    for name in ("noises_per_picture", "autoencoder_digest", "tokenizer_digests"):
        del record[name]  # as in runs of older versions
    (made / "settings.json").write_text(json.dumps(record))
    # Another choice of scenes resumes the same run, and other weights start another.
    run(flow, "--run-dir", made, *flow_options, *data, "--steps", 2)
    assert latest_checkpoint(made).name == "step_2"
    run(flow, "--run-dir", tmp_path / "second", *flow_options, *data, "--init-from", made)

    run(export, "--run", made, "--quantize", 0, "--output", tmp_path / "stickers")
    model = load_pretrained(tmp_path / "stickers")
    assert model.vocabulary["nouns"] == [noun.name for noun in NOUNS[:20]]
    assert model.config.trained_sizes == (MODEL.image_size,)
    assert "Noto Color Emoji" in (tmp_path / "stickers" / "LICENSE").read_text()
    trained = load_ema(made)
    for name, value in flat_parameters(model.transformer).items():
        assert mx.allclose(value, trained[f"transformer.{name}"], atol=1e-2), name

    # A run on other data has neither the words nor the license of the stickers.
    values = json.loads((made / "settings.json").read_text())
    (made / "settings.json").write_text(json.dumps(values | {"data": "pictures"}))
    run(export, "--flow", made, "--quantize", 0, "--output", tmp_path / "other")
    assert "warning: --flow is now --run" in capsys.readouterr().err
    assert load_pretrained(tmp_path / "other").vocabulary is None
    assert not (tmp_path / "other" / "LICENSE").exists()
    # Older versions left no record.
    (made / "settings.json").unlink()
    with pytest.raises(UserError, match=r"does not record its model.*train\.new.*--model"):
        run(export, "--run", made, "--output", tmp_path / "old")
    run(export, "--run", made, "--model", model_folder, "--output", tmp_path / "old")
    assert len(load_pretrained(tmp_path / "old").vocabulary["nouns"]) == len(NOUNS)
    with pytest.raises(UserError, match="exists already"):
        run(export, "--run", made, "--output", tmp_path / "old")
    (made / "settings.json").write_text(json.dumps({"model": str(tmp_path / "moved")}))
    with pytest.raises(UserError, match=r"no model folder.*moved.*with --model"):
        run(export, "--run", made, "--output", tmp_path / "new")
    # A model is exported as it is, with its own words.
    (tmp_path / "copy").mkdir()  # an empty folder is as good as none
    run(export, "--model", model_folder, "--quantize", "none", "--output", tmp_path / "copy")
    assert load_pretrained(tmp_path / "copy").vocabulary == load_pretrained(model_folder).vocabulary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask-ratio", 1], "at least 0 and below 1"),
        (["--distillation-weight", -1], "must not be negative"),
        (["--steps", 0], "--steps must be at least 1"),
        (["--data", "stickers:nouns=3"], "num_nouns is 3"),
        (["--num-nouns", 100], "--num-nouns was removed: give --data stickers:nouns=N"),
        (["--autoencoder", "a"], "--autoencoder was removed: .* train.new"),
        (["--accumulate", 0], "--accumulate must be at least 1"),
        (["--model", "nowhere"], "no model folder nowhere"),
        (["--resolution", 20], "--resolution 20: give a multiple of 32 pixels, such as 32$"),
        (["--init-from", "nowhere"], "no model folder nowhere"),
        (["--init-from", "~no-such-user"], "no model folder ~no-such-user"),
        (["--learning-rate", -1], "--learning-rate must lie between 0 and 1"),
        (["--warmup-steps", -1], "--warmup-steps: -1 is not between 0"),
        (["--final-learning-rate", -1], "--final-learning-rate must not be negative"),
        (["--ema-decay", 2], "--ema-decay must be at most 1"),
        (["--drop-caption", 2], "--drop-caption must be at most 1"),
        (["--time-shift", 0], "--time-shift must be above 0"),
        (["--seed", 10**14], "is not between"),
    ],
)
def test_wrong_options_of_flow_are_one_line(flow_options, run, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(flow, "--run-dir", tmp_path / "run", *flow_options, "--data", "stickers", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (flow, ["--model", "m", "--data", "d"]),
        (kd, ["--teacher", "t"]),
        (kdmd, ["--output", "k.safetensors"]),
        (lora, ["--data", "."]),
        (palettes, ["--output", "p"]),
        (autoencoder, ["--data", "d"]),
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
        (export, ["--run", "r", "--output", "{}/m"]),
        (evaluate, ["--output", "{}/scores"]),
        (tokenizer, ["--output", "{}/t.model", "--data", "d"]),
    ],
)
def test_an_output_that_cannot_be_written_is_found_at_once(command, options, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file, not a folder"):
        run(command, *(option.replace("{}", str(tmp_path / "file")) for option in options))


AUTOENCODER = ["--run-dir", "{}/r", "--data", "stickers"]
TOKENIZER = ["--output", "{}/t", "--data", "stickers", "--num-captions", 50]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (autoencoder, [*AUTOENCODER, "--crop", 60], "multiple of 8, got 60"),
        (autoencoder, [*AUTOENCODER, "--kl-weight", -1], "must not be negative"),
        (autoencoder, [*AUTOENCODER, "--learning-rate", 0], "must lie between"),
        (autoencoder, [*AUTOENCODER, "--num-nouns", 3], "--num-nouns was removed: give --data"),
        (autoencoder, [*AUTOENCODER, "--init-from", "a", "--channels", 4], "has its own sizes"),
        (
            autoencoder,
            [*AUTOENCODER, "--init-from", "a", "--latent-channels", 4],
            "other latents or blocks needs --decoder-only",
        ),
        (tokenizer, [*TOKENIZER, "--vocab-size", 0], "--vocab-size must be at least 1"),
        (tokenizer, [*TOKENIZER, "--vocab-size", 2], "no vocabulary of 2 pieces"),
        (
            tokenizer,
            [*TOKENIZER, "--vocab-size", 9],
            r"of 9 pieces: the captions need at least \d+",
        ),
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
    data = ["--data", "stickers:nouns=20"]
    teacher = ["--few-step-lora", tmp_path / "few.safetensors"]
    run(kdmd, *common, *data, *teacher, "--few-steps", 3, "--fresh-noise", "--output", made)
    assert few_step_sampler(made) == SamplerConfig(3, 1.0, 3.0, fresh_noise=True)
    assert read_lora(made)[1]["model_widths"] == "tiny"
    assert few_step_sampler(tmp_path / "few.safetensors") == FOUR_STEPS
    assert latest_checkpoint(tmp_path / "run").name == "step_2"
    fresh = load_pretrained(model_folder).transformer
    load_lora(made, fresh, name="student")
    assert set(get_lora_weights(fresh)) == {"student"}
    # The student meets other noise levels with other settings; older runs recorded none.
    other = ["--output", tmp_path / "b.safetensors", *data, *teacher]
    with pytest.raises(UserError, match="other few-step settings"):
        run(kdmd, *common, *other)
    settings = tmp_path / "run" / "settings.json"
    record = json.loads(settings.read_text())
    settings.write_text(json.dumps(record | {"model_digest": "of other weights"}))
    with pytest.raises(UserError, match="other few-step settings and files of the model"):
        run(kdmd, *common, *other)
    del record["few_step"], record["model_digest"]
    settings.write_text(json.dumps(record))
    run(kdmd, *common, *other, "--steps", 3)
    assert latest_checkpoint(tmp_path / "run").name == "step_3"
    # The settings of the student's sampler are taken over by the student of this teacher.
    more = ["--few-step-lora", made, "--output", tmp_path / "more.safetensors"]
    prompts = ["--prompts-file", tmp_path / "prompts.txt", "--sizes", "32x32", "32x64"]
    prompts += ["--accumulate", 2, "--save-memory", "--run-dir", tmp_path / "second"]
    run(kdmd, *common, *prompts, *more, "--no-fresh-noise")
    found = few_step_sampler(tmp_path / "more.safetensors")
    assert found == SamplerConfig(3, 1.0, 3.0, fresh_noise=False)
    with pytest.raises(UserError, match="give either --data SOURCE"):
        run(kdmd, *common, "--output", tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="exists already"):
        run(kdmd, *common, "--output", made)
    with pytest.raises(UserError, match=r"ending in \.safetensors"):
        run(kdmd, *common, "--output", tmp_path / "d")
    other = ["--output", tmp_path / "d.safetensors", "--prompts-file", tmp_path / "prompts.txt"]
    with pytest.raises(UserError, match="other data"):
        run(kdmd, *common, *other)


def test_the_tokenizer_has_the_vocabulary_in_whole_words(run, tmp_path):
    made = tmp_path / "made.model"
    run(tokenizer, "--data", "stickers", "--num-captions", 400, "--output", made)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(made))
    assert processor.vocab_size() == 2048
    assert len(processor.encode("apple")) == len(processor.encode("purple")) == 1
    with pytest.raises(UserError, match="exists already"):
        run(tokenizer, "--data", "stickers", "-o", made)


def test_a_tokenizer_of_few_captions_is_as_large_as_they_allow(run, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (32, 32)).save(data / "a.png")
    (data / "a.txt").write_text("Zwei rote Äpfel")
    run(tokenizer, "--data", data, "--output", tmp_path / "made.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "made.model"))
    assert 0 not in processor.encode("zwei rote äpfel") + processor.encode("quick, 10!")
    assert capsys.readouterr().out.endswith(f"made.model: {processor.vocab_size()} pieces\n")
    assert processor.vocab_size() < 100
    for count in (3, 9):
        message = rf"^no vocabulary of {count} pieces: the captions need at least \d+$"
        with pytest.raises(UserError, match=message):
            run(tokenizer, "--data", data, "-o", tmp_path / "b", "--vocab-size", count)


def test_a_run_folder_keeps_its_settings(tmp_path):
    claim(tmp_path / "a", {"rank": 2, "words": 3}, may_change=["words"])
    checkpoint = tmp_path / "a" / "step_1"
    checkpoint.mkdir()
    claim(tmp_path / "a", {"rank": 2, "words": 4}, may_change=["words"])
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["words"] == 4
    now = {"rank": 2, "words": 5, "model": "moved"}
    claim(tmp_path / "a", now, steps=1, may_change=["words", "model"])
    written = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert written == {"rank": 2, "words": 4, "model": "moved"}
    with pytest.raises(UserError, match="other --rank"):
        claim(tmp_path / "a", {"rank": 3, "words": 4}, may_change=["words"])
    (tmp_path / "a" / "settings.json").unlink()
    with pytest.raises(UserError, match="another kind"):
        claim(tmp_path / "a", {"rank": 2})
    claim(tmp_path / "a", {"rank": 2}, unrecorded={"rank": 2})
    assert find_folder(tmp_path / "a") == tmp_path / "a"


def test_k_dmd_trains_all_widths_that_a_model_has(run, tmp_path, monkeypatch):
    """A model of --preset small or tiny has one."""
    one = dataclasses.replace(MODEL.transformer, widths=(1.0,))
    components = make_components(dataclasses.replace(MODEL, transformer=one))
    save_pretrained(tmp_path / "model", components)
    (tmp_path / "prompts.txt").write_text("a red car\ntwo cats\n")
    options = ["--model", tmp_path / "model", "--run-dir", tmp_path / "run", "--steps", 1]
    options += ["--prompts-file", tmp_path / "prompts.txt", "--batch-size", 2, "--rank", 2]
    options += ["--output", tmp_path / "made.safetensors", "--time-shift", "resolution"]
    with pytest.raises(UserError, match=r"--steps 1 never trains the student, .* give at least"):
        run(kdmd, *options)
    options += ["--student-every", 1]
    with pytest.raises(UserError, match="no width 'tiny', only full; choose one with --model-"):
        run(kdmd, *options, "--model-widths", "tiny")
    with pytest.raises(UserError, match="--time-shift: it must be above 0 or resolution, got 0"):
        run(kdmd, *options, "--time-shift", 0)
    shifts, objective = [], kdmd.DMD
    monkeypatch.setattr(kdmd, "DMD", lambda *of: shifts.append(of[3:]) or objective(*of))
    run(kdmd, *options, "--channel-weights", 0.5)
    (shift, weights), *more = shifts
    assert shift is None and not more
    assert weights.mean().item() == pytest.approx(1) and weights.max() > weights.min()
    assert few_step_sampler(tmp_path / "made.safetensors").time_shift is None
    assert any("critic_1000" in name for name in load_ema(tmp_path / "run"))
