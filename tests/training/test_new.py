"""`train.new`: untrained model folders of any size, autoencoder and text encoders."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_snapgen.checkpoint.model import load_autoencoder, load_pretrained, save_pretrained
from mlx_snapgen.checkpoint.module import FORMAT_VERSION
from mlx_snapgen.config import AutoencoderConfig, SamplerConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.pipeline import SnapGenPipeline
from tests import tiny
from tests.runtime.test_clip import MERGES, write_folder
from train import export, flow, new, prepare
from train.data.imagefolder import bucket_sizes
from train.data.prepared import Prepared

SIZES = {
    "hidden_size": 64,
    "head_dim": 8,
    "num_cross_kv_heads": 4,
    "blocks": [1, 2, 1],
    "num_bands": 2,
    "text_width": 32,
    "frequency_dim": 16,
}


@pytest.fixture
def run(monkeypatch):
    def call(*options):
        monkeypatch.setattr(sys, "argv", ["new", *map(str, options)])
        new.main()

    return call


def write_autoencoder(folder, config):
    """What convert.from_torch writes."""
    folder.mkdir()
    values = {"format_version": FORMAT_VERSION, "part": "autoencoder", "quantization": None}
    (folder / "config.json").write_text(json.dumps(values | {"autoencoder": to_dict(config)}))
    model = tiny.randomize(make_autoencoder(config), 3)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "autoencoder.safetensors"), weights)
    return folder


@pytest.fixture
def parts(tmp_path):
    """Files of all parts: sizes, Qwen-Image's autoencoder, a CLIP and a tokenizer."""
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES))
    (tmp_path / "own.model").write_bytes(tiny.tokenizer_bytes())
    (tmp_path / "empty.model").touch()
    write_autoencoder(tmp_path / "qwen", tiny.QWEN_AUTOENCODER)
    write_folder(tmp_path / "clip", tiny.make_clip(MERGES, 48, num_heads=3), "hugging face")
    return tmp_path


def options(parts, *more):
    named = {"--preset": "sizes.json", "--autoencoder": "qwen", "--text-encoder": "clip"}
    given = [word for name, file in named.items() for word in (name, parts / file)]
    return [*given, "--tokenizer", parts / "own.model", *more]


def test_a_model_of_all_kinds_of_parts(parts, run, capsys):
    run(parts / "out", *options(parts, "--encoder-size", 32, "--encoder-layers", 1))
    model = load_pretrained(parts / "out")
    config = model.config
    assert config.transformer.text_dims == (48, 32)
    assert config.transformer.latent_channels == 4
    assert config.transformer.widths == (1.0, 0.5, 0.375)
    assert config.unconditional == "absent"
    assert config.sampler == SamplerConfig(28, 4.0, None)
    assert config.image_size == (256, 256)
    clip, own = config.text_encoders
    assert (clip.kind, clip.source) == ("clip", str((parts / "clip").resolve()))
    assert (own.kind, own.source, own.vocab_size) == ("transformer", None, tiny.VOCAB_SIZE)
    assert (own.hidden_size, own.num_layers, own.max_length) == (32, 1, 64)
    assert not (parts / "out" / "text_encoder_0.safetensors").exists()
    before = dict(tree_flatten(load_autoencoder(parts / "qwen").parameters()))
    for name, value in tree_flatten(model.autoencoder.parameters()):
        np.testing.assert_array_equal(np.array(value), np.array(before[name]), err_msg=name)
    said = capsys.readouterr().out
    assert "transformer, small" in said and "text encoder 1" in said
    assert f"train.flow --model {parts / 'out'} --data {parts / 'out'}-data" in said


def test_a_model_on_latents_of_dc_ae(parts, run, monkeypatch):
    """One token for each latent, from `train.new` through data and training to a picture."""
    (parts / "sizes.json").write_text(json.dumps(SIZES | {"patch_size": 1}))
    vae = write_autoencoder(parts / "dc-ae", tiny.DC_AE)
    with pytest.raises(UserError, match="latents have 1/32 of a picture's side; this one has 1/8"):
        run(parts / "out", *options(parts, "--preset", "small-f32"))
    run(parts / "out", *options(parts, "--autoencoder", vae, "--resolution", 128))
    config = load_pretrained(parts / "out").config
    assert (config.transformer.latent_channels, config.size_unit) == (8, 64)
    (parts / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((150, 130)).save(parts / "pictures" / f"{i}.png")
        (parts / "pictures" / f"{i}.txt").write_text("a red car")
    common = ["--data", parts / "data", "--model", parts / "out"]
    given = [parts / "pictures", "-o", parts / "data", "--model", parts / "out"]
    for module, words in (
        (prepare, [*given, "--resolution", 128, "--held-out", 0]),
        (flow, [*common, "--run-dir", parts / "run", "--steps", 1, "--batch-size", 2]),
        (export, ["--run", parts / "run", "-o", parts / "trained"]),
    ):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        module.main()
    data = Prepared(parts / "data")
    data.check_autoencoder(load_autoencoder(vae))
    assert data.sizes == bucket_sizes((128, 128), 64)
    pipe = SnapGenPipeline.from_pretrained(parts / "trained")
    (picture,) = pipe("a red car", num_inference_steps=1, height=64, width=192, force_size=True)
    assert picture.size == (192, 64)


def test_the_same_seed_gives_the_same_bytes(parts, run):
    run(parts / "a", *options(parts))
    run("-o", parts / "b" / "a", *options(parts))
    run(parts / "c" / "a", *options(parts, "--seed", 1))
    files = sorted(path.name for path in (parts / "a").iterdir())
    for name in files:
        assert (parts / "a" / name).read_bytes() == (parts / "b" / "a" / name).read_bytes(), name
    weights = [(parts / x / "transformer.safetensors").read_bytes() for x in ("a", "c/a")]
    assert weights[0] != weights[1]


def test_sizes_of_another_model(parts, model_folder, run):
    run(parts / "out", *options(parts, "--preset", model_folder, "--resolution", 64))
    config = load_pretrained(parts / "out").config
    assert config.transformer.blocks == tiny.TRANSFORMER.blocks
    assert config.sampler == tiny.MODEL.sampler
    assert config.text_encoders[1].hidden_size == tiny.MODEL.text_encoders[0].hidden_size
    assert config.image_size == (64, 64)


def test_the_preset_of_the_built_in_model(components, parts, run):
    save_pretrained(parts / "model", components)
    common = ["--preset", "stickers", "--autoencoder", parts / "model"]
    run(parts / "out", *common, "--tokenizer", parts / "own.model")
    config = load_pretrained(parts / "out").config
    assert (config.image_size, config.unconditional) == ((128, 128), "empty prompt")
    assert config.sampler == SamplerConfig(28, 2.0, 4.0)
    assert config.text_encoders[0].max_length == 24


def test_weights_of_another_model_where_they_fit(components, parts, run, capsys):
    """Other latents and another tokenizer: all other layers and the tokens in common are copied."""
    save_pretrained(parts / "model", components)
    (parts / "own.model").write_bytes(tiny.tokenizer_bytes(60))
    write_autoencoder(parts / "other", AutoencoderConfig(latent_channels=3))
    given = ["--preset", parts / "model", "--autoencoder", parts / "other"]
    given += ["--tokenizer", parts / "own.model"]
    run(parts / "out", *given, "--weights-from", parts / "model")
    assert re.search(r"\d\d% of the weights to train are those of", capsys.readouterr().out)
    run(parts / "random", *given)
    new, old, fresh = (load_pretrained(parts / name) for name in ("out", "model", "random"))
    networks = [flat_parameters(model.transformer) for model in (new, old, fresh)]

    def stored(weight):
        return weight.astype(mx.bfloat16).astype(mx.float32)

    copied = 0
    for name, value in networks[0].items():
        same = networks[1][name].shape == value.shape
        copied += same
        assert mx.array_equal(value, stored(networks[1 if same else 2][name])), name
    assert 0 < copied < len(networks[0])
    ours, theirs, untrained = (model.text_encoders[0] for model in (new, old, fresh))
    assert mx.array_equal(ours.layers[0].linear1.weight, stored(theirs.layers[0].linear1.weight))
    known = theirs.tokenizer.pieces()
    for k, piece in enumerate(ours.tokenizer.pieces()):
        of = theirs if piece in known else untrained
        row = of.token_embedding.weight[known.index(piece) if piece in known else k]
        assert mx.array_equal(ours.token_embedding.weight[k], stored(row)), piece
    assert ours.tokenizer.pieces() != known
    (parts / "run" / "step_1").mkdir(parents=True)
    (parts / "run" / "step_1" / "state.json").write_text("{}")
    for start, message in (("run", "is a run: write a model with train.export"), ("none", "none")):
        with pytest.raises(UserError, match=message):
            run(parts / "more", *given, "--weights-from", parts / start)


def test_gemma_is_used_from_its_folder(parts, run):
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install -e '.[public]'")
    from tests.runtime.test_gemma import write_gemma

    write_gemma(parts / "gemma", mlx_lm)
    encoders = ["--text-encoder", parts / "gemma", parts / "clip"]
    run(parts / "out", *options(parts)[:4], *encoders)
    gemma, clip = load_pretrained(parts / "out").config.text_encoders
    assert (gemma.kind, gemma.hidden_size, gemma.num_layers) == ("gemma", 24, 3)
    assert gemma.source == str((parts / "gemma").resolve())
    assert clip.kind == "clip"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "smal"], "no such preset, file or model folder .did you mean 'small'"),
        (["--preset", "own.model"], "cannot read"),
        (["--autoencoder", "raw"], r"python -m convert\.from_torch .*raw --output OUT`"),
        (["--autoencoder", "pipe"], r"python -m convert\.from_torch .*pipe --output OUT --sub"),
        (["--text-encoder", "nowhere"], "no model folder nowhere"),
        (["--text-encoder", "language"], "a CLIP or a Gemma 3, language is a Qwen3ForCausalLM$"),
        (["--tokenizer", "nothing"], "cannot read the tokenizer"),
        (["--tokenizer", "sizes.json"], r"sizes\.json: it is not a sentencepiece model$"),
        (["--tokenizer", "empty.model"], r"empty\.model: it is not a sentencepiece model$"),
        (["--resolution", "100"], "100x100 do not divide by 32 pixels: .* --resolution 96 or 128"),
        (
            ["--text-encoder", "nowhere", "--resolution", "100"],
            "100x100 do not divide by 32 pixels",
        ),
        (["--resolution", "20"], "20x20 do not divide by 32 pixels: choose --resolution 32$"),
        (["--autoencoder", "run", "--resolution", "100"], "100x100 do not divide by 32 pixels"),
        (["--autoencoder", "run", "--preset", "tiny-f32"], "this one has 1/8: omit -f32"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--encoder-size", "0"], "0 is not between"),
    ],
)
def test_mistakes_are_one_line(parts, run, monkeypatch, more, message):
    monkeypatch.chdir(parts)
    for name, file in (("raw", "config.json"), ("pipe", "model_index.json")):
        (parts / name).mkdir()
        (parts / name / file).write_text('{"_class_name": "AutoencoderKL"}')
    (parts / "language").mkdir()
    (parts / "language" / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    mx.save_safetensors(
        str(parts / "language" / "model.safetensors"), {"model.norm.weight": mx.ones(8)}
    )
    (parts / "run" / "step_1").mkdir(parents=True)
    # Before the weights of a run are read, and its latents measured.
    (parts / "run" / "settings.json").write_text('{"autoencoder": {}}')
    with pytest.raises(UserError, match=message):
        run(parts / "out", *options(parts, *more))
    assert not (parts / "out").exists()


def test_a_model_needs_a_text_encoder_and_a_new_folder(parts, run):
    with pytest.raises(UserError, match="needs a text encoder"):
        run(parts / "out", *options(parts)[:4])
    with pytest.raises(UserError, match="exists already"):
        run(parts / "clip", *options(parts))
    with pytest.raises(UserError, match="name the output once"):
        run(*options(parts))


# --- from a run of train.autoencoder -------------------------------------------------------------


def call(monkeypatch, command, *options):
    """Runs a command in this process."""
    monkeypatch.setattr(sys, "argv", [command, *map(str, options)])
    importlib.import_module(command).main()


def write_pictures(folder, seed):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for k in range(6):
        name = f"{seed}-{k}"
        Image.fromarray(rng.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(
            folder / f"{name}.png"
        )
        (folder / f"{name}.txt").write_text("a red apple")
    return folder


TRAIN = ["--steps", 1, "--batch-size", 2, "--validation-prompts", "x"]
SHORT = {
    **dict.fromkeys(("train.flow", "train.kd"), TRAIN),
    "train.kdmd": [*TRAIN, "--student-every", 1],
    "train.evaluate": ["--steps", 1, "--pictures", 2],
    "mlx_snapgen.generate": ["--steps", 1],
}


@pytest.fixture
def autoencoder_run(parts, quick, monkeypatch):
    """The folder of a run on `pictures`."""
    monkeypatch.chdir(parts)
    write_pictures(parts / "pictures", 0)
    options = ["--data", "pictures", "--run-dir", "ae", "--resolution", 64, "--channels", 8]
    call(monkeypatch, "train.autoencoder", *options, "--steps", 1, "--batch-size", 2)
    return parts / "ae"


def of_run(*more):
    named = {"--preset": "sizes.json", "--autoencoder": "ae", "--tokenizer": "own.model"}
    return [*(word for pair in named.items() for word in pair), "--resolution", 64, *more]


def test_every_printed_command_works(autoencoder_run, run, monkeypatch, capsys):
    run("my new", *of_run("--encoder-size", 32, "--encoder-layers", 1))
    said = capsys.readouterr().out
    commands = [shlex.split(line)[2:] for line in said.splitlines() if line.startswith("python -m")]
    assert [words[0] for words in commands].count("train.kdmd") == 2
    assert {"train.prepare", "train.kd", "train.evaluate"} < {words[0] for words in commands}
    for command, *words in commands:
        words = ["my new-trained" if word == "TEACHER" else word for word in words]
        assert "PICTURES" not in words
        call(monkeypatch, command, *words, *SHORT.get(command, []))
    assert load_pretrained("my new-4", few_step=True).config.few_step is not None


def test_printed_commands_have_the_options_of_captions(autoencoder_run, run, monkeypatch, capsys):
    classes = write_pictures(autoencoder_run.parent / "classes" / "apple", 1)
    for text in classes.glob("*.txt"):
        text.unlink()
    more = ["--data", "classes", "--captions", "text", "--caption-template", "a photo of a {}"]
    run("new", *of_run(*more))
    lines = [line for line in capsys.readouterr().out.splitlines() if "train.prepare" in line]
    assert all("--captions text --caption-template 'a photo of a {}'" in line for line in lines)
    call(monkeypatch, *shlex.split(lines[0])[2:])
    assert len(lines) == 2 and "6 pictures" in capsys.readouterr().out
    for option, message in (("--caption-template", "where the name"), ("--captions", "x=2: give")):
        with pytest.raises(UserError, match=message):
            run("other", *of_run(option, "x=2"))


def test_columns_of_captions_and_data_that_is_prepared(autoencoder_run, run, monkeypatch, capsys):
    """Every command that reads the data names the columns; prepared data is not prepared again."""
    for text in Path("pictures").glob("*.txt"):
        line = {"file_name": text.with_suffix(".png").name, "short": "a car", "long": "a red car"}
        with open("pictures/metadata.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        text.unlink()
    small = ["--encoder-size", 32, "--encoder-layers", 1]
    for more, message in (
        (["--data", "pictures", "--captions", "short", "lang"], "no such column .did you mean 'lo"),
        (["--data", "nothing"], "no such file or folder: nothing"),
    ):
        with pytest.raises(UserError, match=message):
            run("no", *of_run(*small, *more))
    with monkeypatch.context() as patch:
        patch.setattr("train.options.new.FIRST", 2)  # later pictures may have the column
        run("c", *of_run(*small, "--data", "pictures", "--captions", "short", "lang"))
        assert "none of the first 2 pictures of pictures has a caption 'lang'" in (
            capsys.readouterr().err
        )
    columns = ["--captions", "short", "long"]
    for name, data in (("a", "pictures"), ("b", "a-data")):
        capsys.readouterr()
        run(name, *of_run(*small, "--data", data, *columns))
        said = capsys.readouterr().out
        commands = [shlex.split(line)[2:] for line in said.splitlines() if "python -m" in line]
        for words in commands:
            assert ("--captions" in words) == ("--data" in words or words[0] == "train.prepare")
        if name == "a":
            call(monkeypatch, *commands[0])
    assert [words[0] for words in commands[:2]] == ["train.flow", "train.export"]
    assert commands[0][3:8] == ["--data", "a-data", *columns]
    assert [words[1] for words in commands if words[0] == "train.prepare"] == ["PICTURES"]
    with pytest.raises(UserError, match=r"no caption column 'lang' .did you mean"):
        run("no", *of_run(*small, "--data", "a-data", "--captions", "lang"))
    with pytest.raises(UserError, match="--data: a-data holds encoded pictures, pictures does not"):
        run("no", *of_run(*small, "--data", "pictures", "a-data"))
    write_autoencoder(autoencoder_run.parent / "other", AutoencoderConfig(latent_channels=3))
    with pytest.raises(UserError, match="latents of another autoencoder"):
        run("no", *of_run(*small, "--data", "a-data", "--autoencoder", "other"))
    (autoencoder_run / "latents.json").unlink(missing_ok=True)
    assert not Path("no").exists()


def test_pictures_without_captions_are_told_before_the_commands(autoencoder_run, run, capsys):
    for text in Path("pictures").glob("*.txt"):
        text.unlink()
    run("new", *of_run("--encoder-size", 32, "--encoder-layers", 1))
    assert "pictures has no picture with a caption" in capsys.readouterr().err


def test_stickers_are_not_prepared():
    commands = new.next_commands(Path("new"), ["stickers:nouns=9"], resolution=128, is_elastic=True)
    words = [words for group in commands.values() for words in group]
    assert all("train.prepare" not in command for command in words)
    assert "stickers:nouns=9" in words[0]


def test_the_printed_commands_are_those_of_the_readme():
    """Up to names, order of options, and those that follow from the model."""
    text = Path("train/README.md").read_text().partition("## A model of your own")[2]
    readme = [line.split()[2:] for line in text.split("```")[1].strip().splitlines()]
    groups = new.next_commands(Path("my-new"), ["pictures"], resolution=256, is_elastic=False)
    names = {
        **{"my-new-data": "prepared", "my-new-run": "runs/flow", "my-new-trained": "my-model"},
        **{"my-new-measures": "measures", "my-new-few-step": "runs/few-step"},
        **{"my-new-few-step.safetensors": "few-step.safetensors", "my-new-4": "my-model-4"},
        **{"my-new-kdmd": "runs/kdmd", "my-new-kdmd.safetensors": "kdmd.safetensors"},
        "a prompt": '"a prompt"',
    }
    printed = [
        " ".join(names.get(word, word) for word in words).split()
        for words in [*groups["next"], *groups["then, to draw in four steps"]]
    ]
    # The README draws once, at the end.
    del printed[4]
    start = next(k for k, words in enumerate(readme) if words[0] == "train.prepare")
    assert list(map(sorted, printed)) == list(map(sorted, readme[start:]))


def test_all_models_of_a_run_have_the_same_latents(autoencoder_run, run, capsys):
    """Also when the pictures change, or others are named: prepared data is for all of them."""
    run("a", *of_run())
    write_pictures(autoencoder_run.parent / "pictures", 1)
    write_pictures(autoencoder_run.parent / "others", 2)
    for name, more in (("b", ()), ("c", ("--data", "others"))):
        run(name, *of_run(*more))
        a, other = (load_pretrained(folder).config.autoencoder for folder in ("a", name))
        assert a.latents_std and a == other


def test_a_run_refuses_another_public_text_encoder(parts, quick, run, monkeypatch):
    monkeypatch.chdir(parts)
    write_pictures(parts / "pictures", 0)
    run("model", *options(parts, "--resolution", 64))
    train = ["train.flow", "--model", "model", "--data", "pictures", "--run-dir", "run", *TRAIN[2:]]
    call(monkeypatch, *train, "--steps", 1)
    record = json.loads((parts / "run" / "settings.json").read_text())
    assert len(record["frozen_text_encoders"]) == 1
    path = next((parts / "clip").glob("*.safetensors"))
    weights = {name: value + 1 for name, value in mx.load(str(path)).items()}
    mx.eval(weights)
    size = path.stat().st_size
    mx.save_safetensors(str(path), weights, {"format": "pt"})
    assert abs(path.stat().st_size - size) < 100
    with pytest.raises(
        UserError, match="a run with other files of public text encoders: give another"
    ):
        call(monkeypatch, *train, "--steps", 2)
