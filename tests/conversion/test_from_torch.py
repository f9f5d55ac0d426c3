"""Converting PyTorch weights: streaming, resuming, the account of keys, and what is refused."""

import functools
import json
import os
import sys
import weakref

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from convert import from_torch, pickles
from convert.parity.originals import fill, qwen_image_vae
from convert.report import error_table, summary
from mlx_snapgen.checkpoint.clip import load_clip
from mlx_snapgen.checkpoint.model import load_autoencoder
from mlx_snapgen.checkpoint.text_encoders import load_source
from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.lora.adapters import adapted_layers
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.public import convert as conversion
from mlx_snapgen.public import source, stream
from mlx_snapgen.public.convert import convert
from mlx_snapgen.public.keys.autoencoders import read_autoencoder
from mlx_snapgen.public.kinds import Plan, find_kind
from tests.runtime.test_clip import MERGES, hugging_face, open_clip
from tests.runtime.test_foreign_files import write_peft
from tests.tiny import QWEN_AUTOENCODER, TRANSFORMER, make_clip, require

find_source = functools.partial(source.find_source, spool=pickles.spooled)
VOCAB_SIZE = 512 + len(MERGES.split(b"\n")) + 2


@pytest.fixture(scope="module")
def encoder():
    return make_clip(MERGES, 64, num_heads=4)


def write_clip(folder, encoder, shards=1, layout=hugging_face):
    """A public checkpoint of `encoder` in so many files, and what their names are."""
    folder.mkdir()
    config = {"architectures": ["CLIPTextModel"], "num_attention_heads": 4, "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "merges.txt").write_bytes(MERGES)
    weights = list(layout(encoder).items())
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), dict(weights))
        return [folder / "model.safetensors"]
    paths, index = [], {}
    for i in range(shards):
        path = folder / f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(weights[i::shards])
        mx.save_safetensors(str(path), part)
        index |= dict.fromkeys(part, path.name)
        paths.append(path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return paths


def states(encoder):
    return np.array(encoder(*encoder.tokenize(["a red apple", "the"])))


def as_source(folder, encoder):
    """The encoder of a model whose config names `folder` as its source."""
    config = TextEncoderConfig(**{**vars(encoder.config), "source": str(folder)})
    return load_source(folder, config)


# --- what comes out -----------------------------------------------------------------------------


def test_a_sharded_clip_becomes_a_source(encoder, tmp_path):
    write_clip(tmp_path / "in", encoder, 3)
    report = convert(find_source(str(tmp_path / "in")), tmp_path / "out")
    np.testing.assert_array_equal(states(as_source(tmp_path / "out", encoder)), states(encoder))
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kind"] == "clip"
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


def test_every_key_is_in_the_report(encoder, tmp_path):
    write_clip(tmp_path / "in", encoder)
    path = tmp_path / "in" / "model.safetensors"
    weights = hugging_face(encoder) | {"vision_model.x.weight": mx.zeros(3)}
    mx.save_safetensors(str(path), weights)
    keys = convert(find_source(str(tmp_path / "in")), tmp_path / "out")["keys"]
    assert keys["ignored"] == {"vision_model.x.weight": "not needed for the text tower's states"}
    assert keys["used"] == keys["missing"] == []
    assert {*keys["used"], *keys["renamed"], *keys["ignored"]} == set(weights)
    assert keys["renamed"]["text_model.final_layer_norm.bias"] == "norm.bias"


def test_open_clip_in_a_pickle(encoder, tmp_path):
    torch = pytest.importorskip("torch", reason="pickles are read by torch")
    write_clip(tmp_path / "in", encoder)
    (tmp_path / "in" / "model.safetensors").unlink()
    state = {f"module.{k}": torch.tensor(np.array(v)) for k, v in open_clip(encoder).items()}
    state["module.visual.proj"] = torch.zeros(2, 2, dtype=torch.bfloat16)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "in" / "pytorch_model.bin")
    convert(find_source(str(tmp_path / "in")), tmp_path / "out")
    np.testing.assert_array_equal(states(as_source(tmp_path / "out", encoder)), states(encoder))


def test_every_torch_type_keeps_its_numbers(tmp_path):
    torch = pytest.importorskip("torch", reason="pickles are read by torch")
    values = torch.tensor([[1.5, -2.25], [0.0, 3.0]])
    state = {str(t): values.to(t) for t in (torch.float64, torch.float32, torch.float16)}
    state |= {str(t): values.to(t) for t in (torch.bfloat16, torch.int64, torch.int8, torch.bool)}
    state["scalar"] = torch.tensor(2.0, dtype=torch.bfloat16)
    state["turned"] = values.T
    torch.save(state, tmp_path / "a.bin")
    found = mx.load(str(pickles.spooled(tmp_path / "a.bin", tmp_path / "b" / "a.safetensors")))
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].shape == tuple(value.shape)
        assert np.array_equal(np.array(found[name].astype(mx.float32)), value.float().numpy())
    assert found["torch.bfloat16"].dtype == mx.bfloat16


def test_what_was_read_of_a_pickle_is_let_go(tmp_path, monkeypatch):
    """The pages of a LoRA of 850 MB all counted as this process's memory: it peaked at 1055 MiB."""
    torch = pytest.importorskip("torch", reason="pickles are read by torch")
    state = {f"{i}": torch.randn(64, 64) for i in range(12)}
    torch.save(state, tmp_path / "a.bin")
    load, opened = torch.load, []

    def watched(*args, **kwargs):
        assert all(tensor() is None for tensors in opened for tensor in tensors)
        found = load(*args, **kwargs)
        opened.append([weakref.ref(tensor) for tensor in found.values()])
        return found

    monkeypatch.setattr(torch, "load", watched)
    monkeypatch.setattr(pickles, "MAPPED_BYTES", 4 * state["0"].nbytes)
    found = mx.load(str(pickles.spooled(tmp_path / "a.bin", tmp_path / "a.safetensors")))
    assert len(opened) == 3
    assert found.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(np.array(found[name]), value.numpy())


@pytest.mark.parametrize("form", ["folder", "bin"])
def test_qwen_images_autoencoder(tmp_path, form):
    require("torch", "diffusers")
    public = fill(qwen_image_vae())
    public.save_pretrained(tmp_path / "in", safe_serialization=form == "folder")
    report = convert(find_source(str(tmp_path / "in")), tmp_path / "out")
    assert report["kind"] == "qwen-image-vae"
    assert all("time_conv" in key for key in report["keys"]["ignored"])
    public.save_pretrained(tmp_path / "safe")
    expected = dict(tree_flatten(read_autoencoder(tmp_path / "safe").parameters()))
    found = load_autoencoder(tmp_path / "out")
    assert found.config == QWEN_AUTOENCODER
    for name, value in tree_flatten(found.parameters()):
        assert mx.array_equal(value, expected[name]), name


def test_a_lora_of_peft_keeps_the_alpha_beside_it(tmp_path):
    (tmp_path / "peft").mkdir()
    write_peft(tmp_path / "peft")
    convert(find_source(str(tmp_path / "peft")), tmp_path / "out.safetensors", kind="lora")
    network = EfficientDiT(TRANSFORMER)
    load_lora(tmp_path / "out.safetensors", network, name="style")
    assert {m.adapters["style"].alpha for m in adapted_layers(network).values()} == {16.0}


def test_a_dead_link_among_the_weights_is_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("/nowhere/model.safetensors")
    with pytest.raises(UserError, match="is a link to /nowhere/model"):
        find_source(str(tmp_path))


def test_a_lora_is_one_file_under_the_keys_of_diffusers(components, tmp_path):
    layers = dict(components.transformer.named_modules())
    layer = next(n for n, m in layers.items() if n.endswith("q_proj"))
    rows, columns = layers[layer].weight.shape
    old = {
        f"diffusion_model.{layer}.lora_down.weight": mx.ones((2, columns)),
        f"diffusion_model.{layer}.lora_up.weight": mx.ones((rows, 2)),
        f"diffusion_model.{layer}.alpha": mx.array(1.0),
    }
    mx.save_safetensors(str(tmp_path / "a.safetensors"), old, {"base_model": "random"})
    source = find_source(str(tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match="give a name ending in"):
        convert(source, tmp_path / "b")
    with pytest.raises(UserError, match="not quantized"):
        convert(source, tmp_path / "b.safetensors", quantization={"bits": 4, "group_size": 32})
    assert convert(source, tmp_path / "b.safetensors")["kind"] == "lora"
    found, header = mx.load(str(tmp_path / "b.safetensors"), return_metadata=True)
    name = f"transformer.{layer}"
    assert set(found) == {f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha"}
    assert header["base_model"] == "random"

    network = EfficientDiT(components.config.transformer)
    assert load_lora(tmp_path / "b.safetensors", network) == [layer]
    del old[f"diffusion_model.{layer}.lora_up.weight"]
    mx.save_safetensors(str(tmp_path / "half.safetensors"), old)
    with pytest.raises(UserError, match=f"{layer} lacks lora_B"):
        convert(find_source(str(tmp_path / "half.safetensors")), tmp_path / "c.safetensors")


# --- types and bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_are_those_of_mlx_and_their_error_is_told(encoder, tmp_path, bits):
    write_clip(tmp_path / "in", encoder, 2)
    report = convert(
        find_source(str(tmp_path / "in")),
        tmp_path / "out",
        quantization={"bits": bits, "group_size": 32},
        dtype=mx.float16,
    )
    stored = mx.load(str(tmp_path / "out" / "text_encoder_0.safetensors"))
    layer = "layers.2.linear1"
    weight = encoder.layers[2].linear1.weight.astype(mx.float16)
    for name, part in zip(
        ("weight", "scales", "biases"), mx.quantize(weight, 32, bits), strict=True
    ):
        assert mx.array_equal(stored[f"{layer}.{name}"], part)
    assert stored["norm.weight"].dtype == mx.float16
    loaded = as_source(tmp_path / "out", encoder)
    off = loaded.layers[2].linear1.weight.astype(mx.float32) - weight.astype(mx.float32)
    error = (mx.linalg.norm(off) / mx.linalg.norm(weight.astype(mx.float32))).item()
    assert report["relative_errors"][layer] == pytest.approx(error, rel=1e-3)
    assert 0 < error < {4: 0.1, 8: 0.01}[bits]
    table = error_table(report["relative_errors"])
    assert "layers.*.linear1" in table
    assert len(table.splitlines()) == 1 + 5
    assert "clip" in summary(report, tmp_path / "out")


def test_a_group_that_no_row_divides_by_is_told(encoder, tmp_path):
    write_clip(tmp_path / "in", encoder)
    how = {"bits": 4, "group_size": 512}
    with pytest.raises(UserError, match="512 divides the rows of no matrix"):
        convert(find_source(str(tmp_path / "in")), tmp_path / "out", quantization=how)


# --- streaming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4])
def test_no_more_than_a_few_tensors_are_in_memory(tmp_path, monkeypatch, bits):
    """Forty layers of 1 MiB: what is resident does not grow with their number."""
    monkeypatch.setattr(conversion, "PIECE", 2**16)
    one = mx.random.normal((512, 512))
    for i in range(4):
        keys = [f"x.{i * 10 + k}.lora_A.weight" for k in range(10)]
        mx.save_safetensors(str(tmp_path / f"{i}.safetensors"), dict.fromkeys(keys, one))
    found = {}
    for i in range(4):
        found |= mx.load(str(tmp_path / f"{i}.safetensors"))
    layers = [key.removesuffix(".weight") for key in found]
    plan = Plan(found, "x", matrices=lambda _: layers)
    how = None if bits is None else {"bits": bits, "group_size": 32}
    entries = conversion._entries(plan, mx.bfloat16, how)
    del found, plan
    mx.eval(one)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    stream.write_tensors(tmp_path / "out.safetensors", entries, tmp_path / "journal")
    assert mx.get_peak_memory() - before < 3 * one.nbytes
    assert mx.get_active_memory() - before < one.nbytes
    assert len(mx.load(str(tmp_path / "out.safetensors"))) == 40 * (3 if bits else 1)


def test_quantizing_takes_little_more_than_the_matrix():
    """Its float32 copies are of a piece at a time: those of Qwen-Image's took 490 MiB."""
    value = mx.random.normal((4096, 2048)).astype(mx.bfloat16)
    mx.eval(value)
    mx.clear_cache()
    before, size = mx.get_active_memory(), value.nbytes
    mx.reset_peak_memory()
    entry = conversion._packed("x", value, bits=4, group_size=32)
    del value
    tensors, (_, error) = entry.make()
    mx.eval(tensors)
    assert mx.get_peak_memory() - before < 2.5 * size
    assert 0 < error < 0.1


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_conversion_goes_on_where_it_was(encoder, tmp_path, monkeypatch, torn):
    write_clip(tmp_path / "in", encoder, 3)
    source, out = find_source(str(tmp_path / "in")), tmp_path / "out"
    made = []
    write = stream.write_tensors

    def stops(fail):
        def patched(path, entries, journal, **settings):
            def make(i, entry):
                if i == fail:
                    raise KeyboardInterrupt
                made.append(i)
                return entry.make()

            wrapped = [
                stream.Entry(e.shapes, lambda i=i, e=e: make(i, e)) for i, e in enumerate(entries)
            ]
            return write(path, wrapped, journal, sync_bytes=1, **settings)

        monkeypatch.setattr(conversion, "write_tensors", patched)

    stops(20)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, quantization={"bits": 4, "group_size": 32})
    assert not out.exists()
    assert made == list(range(20))
    if torn:  # in the middle of a line of the journal
        journal = tmp_path / ".out.partial" / "journal"
        journal.write_bytes(journal.read_bytes()[:-3])
    made.clear()
    stops(None)
    report = convert(source, out, quantization={"bits": 4, "group_size": 32})
    assert made[0] == (19 if torn else 20)
    convert(source, tmp_path / "at once", quantization={"bits": 4, "group_size": 32})
    name = "text_encoder_0.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()
    assert len(report["relative_errors"]) == 1 + 3 * 4
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out", "at once"}


def test_the_journal_names_what_is_on_the_disk(tmp_path, monkeypatch):
    """After a power cut it may name no entry that was not flushed."""
    journal, flushed = tmp_path / "journal", []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (fsync(file), flushed.append(journal.read_text().count("\n")))
    )
    entries = [stream.lazy(f"{k}", mx.ones((4,))) for k in range(3)]
    stream.write_tensors(tmp_path / "out.safetensors", entries, journal, sync_bytes=1)
    assert flushed == [0, 1, 2]


def test_other_options_start_over(encoder, tmp_path, monkeypatch):
    write_clip(tmp_path / "in", encoder)
    source, out = find_source(str(tmp_path / "in")), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(
            conversion, "peak_process_bytes", lambda: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, quantization={"bits": 4, "group_size": 32})
    assert (tmp_path / ".out.partial" / "journal").exists()
    report = convert(source, out)
    assert report["relative_errors"] == {}
    np.testing.assert_array_equal(states(as_source(out, encoder)), states(encoder))


def test_two_conversions_to_one_place_do_not_mix(encoder, tmp_path, monkeypatch):
    write_clip(tmp_path / "in", encoder)
    source = find_source(str(tmp_path / "in"))

    def meanwhile(*args, **settings):
        with pytest.raises(UserError, match="another conversion is writing"):
            convert(source, tmp_path / "out")
        return stream.write_tensors(*args, **settings)

    monkeypatch.setattr(conversion, "write_tensors", meanwhile)
    convert(source, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        convert(source, tmp_path / "out")


# --- what is refused ----------------------------------------------------------------------------


def test_files_that_are_not_whole_are_named(encoder, tmp_path):
    paths = write_clip(tmp_path / "in", encoder, 3)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"00002-of-00003.*is truncated: \d+ of \d+ bytes"):
        convert(find_source(str(tmp_path / "in")), tmp_path / "out")
    paths[1].write_bytes(whole[:40])
    with pytest.raises(UserError, match="is truncated, or no safetensors file"):
        convert(find_source(str(tmp_path / "in")), tmp_path / "out")
    paths[1].unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-00003\.safetensors, which"):
        find_source(str(tmp_path / "in"))
    (tmp_path / "in" / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"lacks the index .*model\.safetensors\.index\.json"):
        find_source(str(tmp_path / "in"))
    assert {p.name for p in tmp_path.iterdir()} == {"in"}


def test_keys_that_are_missing_unknown_or_misshapen_are_named(encoder, tmp_path):
    path = write_clip(tmp_path / "in", encoder)[0]
    weights = hugging_face(encoder)
    gone = "text_model.encoder.layers.2.mlp.fc1.bias"
    odd = {
        "lacks layers.2.linear1.bias": {k: v for k, v in weights.items() if k != gone},
        r"layers.2.linear1.bias \(3,\) instead of \(256,\)": weights | {gone: mx.zeros(3)},
        "'pooler.weight' belongs to no CLIP": weights | {"pooler.weight": mx.zeros(3)},
        "stored as whole numbers": weights | {gone: mx.zeros(256, mx.int8)},
        "'text_model.a.*' and 'a.*' are the same|belongs to no CLIP": weights | {"a": mx.zeros(1)},
        "and 'final_layer_norm.bias' are the same": weights
        | {"final_layer_norm.bias": mx.zeros(64)},
    }
    for message, found in odd.items():
        mx.save_safetensors(str(path), found)
        with pytest.raises(UserError, match=message) as error:
            convert(find_source(str(tmp_path / "in")), tmp_path / "out")
        assert "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"in"}


def test_kinds_that_are_not_known_name_the_near_ones(encoder, tmp_path):
    write_clip(tmp_path / "in", encoder)
    source = find_source(str(tmp_path / "in"))
    with pytest.raises(UserError, match=r"no kind 'clop' \(did you mean 'clip'\?\)"):
        find_kind(source, {}, "clop")
    (tmp_path / "in" / "config.json").write_text('{"architectures": ["CLIPTextModelV9"]}')
    with pytest.raises(
        UserError, match=r"'CLIPTextModelV9' in config.json \(did you mean 'CLIPTextModel'"
    ):
        convert(find_source(str(tmp_path / "in")), tmp_path / "out")
    mx.save_safetensors(str(tmp_path / "a.safetensors"), hugging_face(encoder) | {"x": mx.zeros(1)})
    with pytest.raises(UserError, match=r"'clip' has (\d+) of its .* keys"):
        convert(find_source(str(tmp_path / "a.safetensors")), tmp_path / "out")


def test_pickles_that_could_run_code_are_not_opened(tmp_path):
    torch = pytest.importorskip("torch", reason="pickles are read by torch")

    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    torch.save({"weight": Harm()}, tmp_path / "a.bin")
    with pytest.raises(UserError, match="holds more than weights and was not opened"):
        convert(find_source(str(tmp_path / "a.bin")), tmp_path / "out")
    torch.save({"weight": torch.zeros(300)}, tmp_path / "b.bin")
    (tmp_path / "b.bin").write_bytes((tmp_path / "b.bin").read_bytes()[:900])
    with pytest.raises(UserError, match=r"b\.bin is truncated or damaged"):
        convert(find_source(str(tmp_path / "b.bin")), tmp_path / "out")


def test_without_torch_a_pickle_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pip install torch, or get the checkpoint as"):
        convert(find_source(str(tmp_path / "a.bin")), tmp_path / "out")


def test_places_without_a_checkpoint_are_one_line(encoder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no model folder"):
        find_source(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="holds no weights"):
        find_source(str(tmp_path))
    (tmp_path / "pipe").mkdir()
    write_clip(tmp_path / "pipe" / "text_encoder", encoder)
    with pytest.raises(UserError, match="a whole pipeline: name a part with --subfolder text_enc"):
        find_source(str(tmp_path / "pipe"))
    assert find_source(str(tmp_path / "pipe"), subfolder="text_encoder").config is not None
    (tmp_path / "a.gguf").write_bytes(b"x")
    with pytest.raises(UserError, match="is no checkpoint"):
        find_source(str(tmp_path / "a.gguf"))


def test_a_repository_is_fetched_without_its_pickles(encoder, tmp_path, monkeypatch):
    write_clip(tmp_path / "in", encoder)
    asked = []

    def fetched(repo, revision=None, files=(), progress=None):
        asked.append((repo, revision, tuple(files)))
        return tmp_path / "in"

    monkeypatch.setattr("mlx_snapgen.public.source.find_model", fetched)
    assert find_source("owner/name", "v1").files == (tmp_path / "in" / "model.safetensors",)
    # The weights are those of the commit whose config was read.
    assert [a[:2] for a in asked] == [("owner/name", "v1"), ("owner/name", "in")]
    assert not {"*.safetensors", "*.bin"} & {*asked[0][2]}
    assert "*.bin" not in asked[1][2]
    (tmp_path / "in" / "model.safetensors").rename(tmp_path / "in" / "pytorch_model.bin")
    assert find_source("owner/name").files[0].name == "pytorch_model.bin"
    assert "*.bin" in asked[-1][2]


def test_the_command_is_one_line_on_mistakes_and_tells_what_it_did(
    encoder, tmp_path, monkeypatch, capsys
):
    write_clip(tmp_path / "in", encoder)
    command = ["from_torch", str(tmp_path / "in"), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--kind", "clap"])
    with pytest.raises(SystemExit) as code:
        run_command(from_torch.main)
    assert code.value.code == 2
    assert capsys.readouterr().err.startswith("error: no kind 'clap' (did you mean 'clip'?)")
    monkeypatch.setattr(sys, "argv", command)
    from_torch.main()
    assert "0 used, 52 renamed, 0 ignored, 0 missing" in capsys.readouterr().out
    assert load_clip(tmp_path / "in").config.num_layers == 3
