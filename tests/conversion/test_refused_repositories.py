"""A repository of something else is refused on its configs, before its weights are fetched."""

import dataclasses
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from convert import from_torch, teacher
from mlx_snapgen.checkpoint.clip_towers import load_clip_towers
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.errors import UserError, naming, run_command
from mlx_snapgen.public.convert import convert
from mlx_snapgen.public.source import find_source
from mlx_snapgen.teachers.folder import load_prompts
from tests.hub import Hub
from tests.tiny import TEACHER
from train.loop.assemble import public_encoder
from train.loop.run import find_folder

CONFIGS = {
    "someone/language": {"config.json": {"architectures": ["LlamaForCausalLM"]}},
    "someone/pipe": {
        "model_index.json": {"_class_name": "FluxPipeline"},
        "vae/config.json": {"_class_name": "AutoencoderKL"},
    },
    "someone/vae": {"config.json": {"_class_name": "AutoencoderKL"}},
    "someone/few": {"transformer/config.json": {"_class_name": "AutoencoderKL"}},
    "someone/alone": {"model_index.json": {"_class_name": "FluxPipeline"}},
    "someone/none": {"tokenizer/vocab.json": {}},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folders = {}
    for repo, files in CONFIGS.items():
        folder = folders[repo] = tmp_path / "remote" / repo.partition("/")[2]
        for name, values in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
            mx.save_safetensors(str(path.with_name("model.safetensors")), {"a": mx.ones(8)})
    made = Hub(folders["someone/vae"], **folders)
    made.answer(monkeypatch, tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    yield made
    made.close()


def command(name, *options):
    """A command that is called with a repository."""

    def call(repo, monkeypatch):
        module = importlib.import_module(name)
        words = [repo if option is None else option for option in options]
        monkeypatch.setattr("sys.argv", [name, *words])
        for needs in ("require", "require_coremltools"):  # for what follows
            monkeypatch.setattr(module, needs, lambda *_: None, raising=False)
        known = ("flux2", None, None)
        monkeypatch.setattr(module, "read_network", lambda _: known, raising=False)
        module.main()

    return call


def text_of_a_teacher(repo, monkeypatch):
    config = dataclasses.replace(TEACHER, text_encoder=repo)
    load_prompts(Path(), config, dtype=None)


def of(function):
    return lambda repo, monkeypatch: function(repo)


MEASURE = "a CLIP is wanted, and someone"
ENCODER = "--text-encoder takes a CLIP or a Gemma 3, someone/language is a LlamaForCausalLM"
DIFFUSERS = "is in the format of diffusers: convert it with `python -m convert.from_torch someone"
OURS = "is no model of mlx_snapgen, and no autoencoder of convert.from_torch"


@pytest.mark.parametrize(
    ("call", "repo", "message"),
    [
        (of(public_encoder), "someone/language", ENCODER),
        (of(public_encoder), "someone/pipe", f"{DIFFUSERS}/pipe --output OUT --subfolder vae`"),
        (of(load_clip_towers), "someone/language", f"{MEASURE}/language is a LlamaForCausalLM"),
        (of(load_clip_towers), "someone/pipe", f"{MEASURE}/pipe is a whole model in diffusers'"),
        (of(find_folder), "someone/vae", f"{DIFFUSERS}/vae --output OUT`, and give OUT"),
        (of(find_folder), "someone/language", f"someone/language {OURS}"),
        (of(find_folder), "someone/none", f"someone/none {OURS}"),
        (command("convert.from_torch", None, "out"), "someone/language", "is of an unknown kind"),
        (
            command("convert.from_torch", None, "out"),
            "someone/pipe",
            "someone/pipe is a whole pipeline: name a part with --subfolder vae, or download "
            "model.safetensors and give that file",
        ),
        (command("convert.to_torch", None, "out"), "someone/vae", "an autoencoder alone"),
        (
            command("convert.coreml.__main__", None, "out"),
            "someone/none",
            "is not an mlx_snapgen model",
        ),
        (
            command("convert.autoencoder", "vae", "out", "--model", None),
            "someone/language",
            r"one part of a model alone \(LlamaForCausalLM\)",
        ),
        (
            command("convert.teacher", ".", "out", "--few-step-model", None),
            "someone/few",
            "Flux2Transformer2DModel, got AutoencoderKL: give a model",
        ),
        (text_of_a_teacher, "someone/language", "holds a None, this teacher's text encoder is a"),
    ],
)
def test_weights_are_not_fetched(call, repo, message, hub, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        call(repo, monkeypatch)
    assert repo in str(error.value) and str(tmp_path) not in str(error.value)
    assert not [name for name in hub.names() if name.endswith(".safetensors")]


def test_messages_about_weights_name_the_repository(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["from_torch", "someone/vae", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        run_command(from_torch.main)
    said = capsys.readouterr().err
    assert "error: someone/vae is not a kl-vae" in said and str(tmp_path) not in said
    path = find_model("someone/vae") / "config.json"
    for where in (path, "someone/vae/config.json"):
        with pytest.raises(UserError) as error, naming(path):
            raise UserError(f"{where} is damaged")
        assert str(error.value) == "someone/vae/config.json is damaged"


def test_the_rest_of_the_others_is_fetched(hub):
    seen = []
    source = find_source("someone/pipe", subfolder="vae", check=seen.append)
    assert [path.name for path in source.files] == ["model.safetensors"]
    assert seen[0].config == source.config == {"_class_name": "AutoencoderKL"}
    assert "vae/model.safetensors" in hub.names()


def test_one_file_beside_an_index_is_taken_if_it_is_all_there_is(hub, tmp_path):
    assert [path.name for path in find_source("someone/alone").files] == ["model.safetensors"]
    # On a disk it costs nothing to look at the file first.
    folder = hub.folders["someone/pipe"]
    for key in ("a", "x_embedder.weight"):  # unknown, and a transformer, which needs a config
        mx.save_safetensors(str(folder / "model.safetensors"), {key: mx.ones((8, 8))})
        with pytest.raises(UserError, match=r"pipe is a whole pipeline: .* --subfolder vae$"):
            convert(find_source(str(folder)), tmp_path / "out")
    weights = {f"unet.up.to_q.lora_{side}.weight": mx.ones((2, 2)) for side in ("down", "up")}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    report = convert(find_source(str(folder)), tmp_path / "lora.safetensors")
    assert report["kind"] == "lora"


def test_a_few_step_model_is_compared_with_the_transformer_that_is_given(tmp_path, monkeypatch):
    compared = []

    def stop(few_step, network):
        raise UserError("compared")

    described = SimpleNamespace(file=None, folder=tmp_path, inside="")
    monkeypatch.setattr(teacher, "describe_public", lambda *_, **__: described)
    monkeypatch.setattr(teacher, "read_network", lambda at: (compared.append(at), None))
    monkeypatch.setattr(teacher, "few_step_network", stop)
    words = ["owner/name", str(tmp_path / "out"), "--few-step-model", str(tmp_path)]
    for given, at in (([], tmp_path / "transformer"), (["--transformer", "dit"], Path("dit"))):
        monkeypatch.setattr("sys.argv", ["convert.teacher", *words, *given])
        with pytest.raises(UserError, match="compared"):
            teacher.main()
        assert compared.pop() == at
