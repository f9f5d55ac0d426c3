"""The model folder: what is saved is what is loaded, and whatever does not fit is named."""

import dataclasses
import json
import shutil
import subprocess
import sys

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import constants

from mlx_snapgen.checkpoint import hub, model
from mlx_snapgen.checkpoint.config import ModelFolder, load_config, load_vocabulary
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.checkpoint.module import EIGHT_BITS, even_steps, rounded
from mlx_snapgen.errors import UserError
from mlx_snapgen.formats import DESCRIPTIONS
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.elastic import ElasticLinear, extract
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.quantize import runtime
from mlx_snapgen.quantize.runtime import quantize_transformer
from mlx_snapgen.settings import BUILT_IN
from tests.tiny import AUTOENCODER, COMMIT, velocity, write_hub_cache


def assert_same_weights(a, b):
    a, b = flat_parameters(a), flat_parameters(b)
    assert a.keys() == b.keys()
    for name in a:
        assert mx.array_equal(a[name], b[name]), name


@pytest.fixture
def copy(model_folder, tmp_path):
    """A model folder that a test may damage."""
    return shutil.copytree(model_folder, tmp_path / "copy")


def edit_weights(path, change):
    values = mx.load(str(path))
    mx.eval(values)
    change(values)
    mx.save_safetensors(str(path), values)


def edit_config(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# --- round trips --------------------------------------------------------------------------------


def test_round_trip_is_exact(components, model_folder):
    loaded = load_pretrained(model_folder)
    assert loaded.config == components.config
    assert loaded.vocabulary == components.vocabulary
    for name, module in components.modules().items():
        assert_same_weights(module, loaded.modules()[name])
    prompt = ["a red apple"]
    for ours, theirs in zip(components.text_encoders, loaded.text_encoders, strict=True):
        assert mx.array_equal(ours.tokenize(prompt)[0], theirs.tokenize(prompt)[0])
        assert mx.array_equal(ours(*ours.tokenize(prompt)), theirs(*theirs.tokenize(prompt)))
    assert mx.array_equal(velocity(components.transformer), velocity(loaded.transformer))


def test_the_folder_holds_the_files_of_the_format(model_folder):
    assert sorted(p.name for p in model_folder.iterdir()) == [
        "autoencoder.safetensors",
        "config.json",
        "text_encoder_0.safetensors",
        "text_encoder_1.safetensors",
        "tokenizer_0.model",
        "tokenizer_1.model",
        "transformer.safetensors",
        "vocabulary.json",
    ]
    assert json.loads((model_folder / "config.json").read_text())["format_version"] == 1


def test_bfloat16_is_stored_and_computed_in_on_a_gpu_alone(components, tmp_path, monkeypatch):
    save_pretrained(tmp_path / "m", components, dtype=mx.bfloat16)
    stored = mx.load(str(tmp_path / "m" / "transformer.safetensors"))
    assert {v.dtype for v in stored.values()} == {mx.bfloat16}
    monkeypatch.setattr(model.mx, "default_device", lambda: mx.Device(mx.cpu, 0))
    loaded = load_pretrained(tmp_path / "m")
    for name, value in flat_parameters(loaded.transformer).items():
        assert value.dtype == mx.float32
        assert mx.array_equal(value, stored[name].astype(mx.float32)), name
    monkeypatch.setattr(model.mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    half = load_pretrained(tmp_path / "m")
    for module in (half.transformer, *half.text_encoders):
        assert {v.dtype for v in flat_parameters(module).values()} == {mx.bfloat16}
    assert {v.dtype for v in flat_parameters(half.autoencoder).values()} == {mx.float32}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("part", "packed_layer", "whole_layer"),
    [
        ("transformer", "down_blocks.0.self_attention.q_proj", "patch_embed"),
        ("autoencoder", "decoder.blocks1.0.conv1", "decoder.inp"),
    ],
)
def test_quantized_storage_is_off_by_at_most_a_step(
    part, packed_layer, whole_layer, components, tmp_path, bits
):
    folder = tmp_path / "m"
    how = {part: {"bits": bits, "group_size": 32}}
    # Of a group's size at least.
    wide = dataclasses.replace(AUTOENCODER, decoder_channels=(32, 8, 8))
    components = dataclasses.replace(components, autoencoder=make_autoencoder(wide))
    save_pretrained(folder, components, quantize=how)
    stored = mx.load(str(folder / f"{part}.safetensors"))
    packed = [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]
    assert packed_layer in packed
    assert stored[f"{packed_layer}.weight"].dtype == mx.uint32
    assert not any("modulation.members" in name or name == whole_layer for name in packed)
    loaded = load_pretrained(folder)
    assert loaded.config.quantization == how
    before, after = (flat_parameters(c.modules()[part]) for c in (components, loaded))
    for name, value in after.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in packed:
            error = mx.abs(value - before[name]).reshape(*value.shape[:-1], -1, 32)
            assert (error <= mx.abs(stored[f"{layer}.scales"])[..., None] * 1.001).all(), name
        else:
            assert mx.array_equal(value, before[name]), name
    changed = after[f"{packed_layer}.weight"] - before[f"{packed_layer}.weight"]
    assert mx.abs(changed).max() > 0
    # A layer's own bias is not mistaken for the biases of its groups.
    assert mx.array_equal(after[f"{whole_layer}.bias"], before[f"{whole_layer}.bias"])
    save_pretrained(tmp_path / "again", loaded)
    assert load_config(tmp_path / "again").quantization is None


def test_even_steps_are_the_same_when_done_again():
    """Also where MLX's own are not; off by half a step of the largest number / 127 at most."""
    mx.random.seed(0)
    weight = mx.random.normal((256, 3, 64)) * mx.exp(mx.random.normal((256, 1, 1)))
    weight[5] = 0
    weight[6] = mx.arange(64) - 31.5
    once = rounded(weight)
    assert mx.array_equal(rounded(once), once)
    groups = [x.reshape(-1, 32) for x in (weight, once)]
    steps = mx.abs(groups[0]).max(-1, keepdims=True) / 127
    error = mx.abs(groups[1] - groups[0])
    assert (error <= 0.76 * steps).all() and (error > 0.4 * steps).any()
    packed, scales, biases = even_steps(weight)
    assert (packed.dtype, scales.dtype) == (mx.uint32, mx.bfloat16)
    whole = np.array(packed).view(np.uint8).reshape(-1, 32) - 128.0
    scales = np.array(scales.astype(mx.float32)).reshape(-1, 1)
    np.testing.assert_array_equal(whole * scales, np.array(once).reshape(-1, 32))
    assert mx.array_equal(biases, -128 * even_steps(weight)[1])
    own = mx.dequantize(*mx.quantize(weight, **EIGHT_BITS), **EIGHT_BITS)
    again = mx.dequantize(*mx.quantize(own, **EIGHT_BITS), **EIGHT_BITS)
    assert not mx.array_equal(again, own)


def test_an_autoencoder_in_8_bits_stays_the_same_when_saved_again(components, tmp_path):
    wide = dataclasses.replace(AUTOENCODER, encoder_channels=(32, 64), decoder_channels=(32, 8, 8))
    components = dataclasses.replace(components, autoencoder=make_autoencoder(wide))
    how = {"autoencoder": EIGHT_BITS}
    loaded = []
    for name in "abc":
        save_pretrained(tmp_path / name, components, quantize=how)
        components = load_pretrained(tmp_path / name)
        loaded.append(flat_parameters(components.autoencoder))
    for name, value in loaded[0].items():
        assert value.dtype == mx.float32
        assert all(mx.array_equal(other[name], value) for other in loaded[1:]), name


def test_quantized_files_are_smaller(components, model_folder, tmp_path):
    how = {"bits": 4, "group_size": 32}
    names = ("transformer", "text_encoder_0")
    save_pretrained(tmp_path / "m", components, quantize=dict.fromkeys(names, how))
    for name in names:
        small, large = (
            (f / f"{name}.safetensors").stat().st_size for f in (tmp_path / "m", model_folder)
        )
        assert small < 0.45 * large, name


@pytest.mark.parametrize("width", [1.0, 0.5, 0.375])
def test_loading_one_width_gives_that_sub_network_alone(components, model_folder, width):
    loaded = load_pretrained(model_folder, share=width)
    assert loaded.config.transformer == components.config.transformer.standalone(width)
    assert_same_weights(loaded.transformer, extract(components.transformer, width))
    expected = velocity(components.transformer, width)
    assert mx.allclose(velocity(loaded.transformer), expected, atol=1e-5)


def test_one_width_takes_the_memory_of_that_width(components, tmp_path):
    config = dataclasses.replace(components.config.transformer, hidden_size=512, head_dim=64)
    big = dataclasses.replace(components, transformer=EfficientDiT(config))
    save_pretrained(tmp_path / "big", big)
    del big
    before = mx.get_active_memory()
    loaded = load_pretrained(tmp_path / "big", share=0.375)
    used = mx.get_active_memory() - before
    alone = sum(v.nbytes for m in loaded.modules().values() for v in flat_parameters(m).values())
    supernetwork = (tmp_path / "big" / "transformer.safetensors").stat().st_size
    assert alone < 0.25 * supernetwork
    # small arrays may share a page with what they were cut from
    assert used < 1.3 * alone


def test_a_loaded_width_can_be_saved_as_a_model(components, model_folder, tmp_path):
    save_pretrained(tmp_path / "small", load_pretrained(model_folder, share=0.5))
    alone = load_pretrained(tmp_path / "small")
    assert alone.config.transformer.hidden_size == 32
    expected = velocity(components.transformer, 0.5)
    assert mx.allclose(velocity(alone.transformer), expected, atol=1e-5)


# --- writing ------------------------------------------------------------------------------------


def test_refuses_to_overwrite(components, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        save_pretrained(tmp_path / "m", components)
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="exists already"):
        save_pretrained(tmp_path / "m" / "mine.txt", components)


def test_an_empty_folder_is_filled(components, tmp_path):
    (tmp_path / "m").mkdir()
    save_pretrained(tmp_path / "m", components, texts={"README.md": "Random."})
    assert (tmp_path / "m" / "README.md").read_text() == "Random."
    assert load_config(tmp_path / "m") == components.config


def test_a_write_that_fails_leaves_nothing(components, tmp_path, monkeypatch):
    save, count = mx.save_safetensors, []

    def fail_at_the_second(path, *args):
        count.append(path)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        save(path, *args)

    monkeypatch.setattr(model.mx, "save_safetensors", fail_at_the_second)
    with pytest.raises(UserError, match="No space left"):
        save_pretrained(tmp_path / "m", components)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({"transfomer": {"bits": 4, "group_size": 32}}, "did you mean 'transformer'"),
        ({"transformer": {"bits": 7, "group_size": 32}}, "7 bits"),
        ({"transformer": {"bits": 4, "group_size": 48}}, "groups of 48"),
        ({"transformer": {"bits": 4}}, "needs bits and group_size"),
    ],
)
def test_impossible_quantization(components, tmp_path, quantize, message):
    with pytest.raises(UserError, match=message):
        save_pretrained(tmp_path / "m", components, quantize=quantize)
    assert list(tmp_path.iterdir()) == []


# --- strict loading -----------------------------------------------------------------------------


def test_missing_unknown_and_misshapen_weights_are_named(copy, monkeypatch):
    def damage(values):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            del values[f"down_blocks.0.self_attention.{name}.weight"]
        values["extra.weight"] = mx.zeros((2,))
        values["patch_embed.bias"] = mx.zeros((65,))
        values["patch_embed.weight"] = values["patch_embed.weight"].astype(mx.int32)

    edit_weights(copy / "transformer.safetensors", damage)
    monkeypatch.chdir(copy.parent)  # with pytest's long path, the middle would be cut
    with pytest.raises(UserError) as error:
        load_pretrained(copy.name)
    message = str(error.value)
    assert "\n" not in message
    assert "lacks down_blocks.0.self_attention.q_proj.weight" in message
    assert "and 3 more" in message
    assert "unknown extra.weight" in message
    assert "patch_embed.bias (65,) instead of (64,)" in message
    assert "stores as whole numbers patch_embed.weight" in message


@pytest.mark.parametrize("kept", [0, 5, 60, 0.5, 0.999])
def test_a_truncated_file_is_one_line(copy, kept):
    path = copy / "autoencoder.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(UserError, match=r"autoencoder\.safetensors is truncated") as error:
        load_pretrained(copy)
    assert "\n" not in str(error.value)


def test_a_pickle_is_not_opened(copy):
    (copy / "transformer.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n(Vfalse\ntR.")
    with pytest.raises(UserError, match="is truncated"):
        load_pretrained(copy)


def test_packed_weights_need_their_record(components, tmp_path):
    how = {"transformer": {"bits": 4, "group_size": 32}}
    save_pretrained(tmp_path / "m", components, quantize=how)
    edit_config(tmp_path / "m", lambda c: c.update(quantization=None))
    with pytest.raises(UserError, match=r"unknown .*scales"):
        load_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", lambda c: c.update(quantization={"transformer": {"bits": 8}}))
    with pytest.raises(UserError, match="needs bits and group_size"):
        load_pretrained(tmp_path / "m")
    how = {"transformer": {"bits": 8, "group_size": 64}}
    edit_config(tmp_path / "m", lambda c: c.update(quantization=how))
    with pytest.raises(UserError):
        load_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("format_version"), "not an mlx_snapgen model"),
        (lambda c: c.update(format_version=99), "format version 99"),
        (lambda c: c.update(image_sise=[1, 2]), "did you mean 'image_size'"),
        (
            lambda c: c["transformer"].update(hidden_size="many"),
            "a whole number, not .many.",
        ),
        (lambda c: c["transformer"].update(text_dims=[32, 8]), "states of"),
        (lambda c: c["text_encoders"][0].update(kind="t5"), "kind 't5', known: transformer"),
        (lambda c: c["text_encoders"][0].update(vocab_size=10), "tokens"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(copy, change, message):
    edit_config(copy, change)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["config.json", "transformer.safetensors", "text_encoder_1.safetensors", "tokenizer_0.model"],
)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_pretrained(copy)


def test_a_damaged_tokenizer_is_a_user_error(copy):
    (copy / "tokenizer_0.model").write_bytes(b"not a tokenizer")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_pretrained(copy)


def test_the_vocabulary_is_optional_and_checked(copy):
    (copy / "vocabulary.json").write_text('{"nouns": "apple"}')
    with pytest.raises(UserError, match="list of words"):
        load_vocabulary(copy)
    (copy / "vocabulary.json").unlink()
    assert load_pretrained(copy).vocabulary is None


# --- finding ------------------------------------------------------------------------------------


def test_a_missing_folder_says_so(tmp_path, model_folder):
    with pytest.raises(UserError, match="no model folder"):
        load_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match="is a file"):
        load_pretrained(model_folder / "config.json")
    with pytest.raises(UserError, match="only a Hugging Face repository has revisions"):
        load_pretrained(model_folder, revision="main")


def test_a_missing_default_model_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "checkpoint" / "hub.py"))
    with pytest.raises(UserError, match="default model is missing"):
        load_pretrained()


def test_its_name_is_the_built_in_model_unless_a_model_of_that_name_is_here(
    tmp_path, monkeypatch, model_folder
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / BUILT_IN).mkdir()
    assert hub.find_model(BUILT_IN) == hub.default_model_path()
    assert ModelFolder.open(BUILT_IN).source is None
    (tmp_path / BUILT_IN).rmdir()
    (tmp_path / BUILT_IN).symlink_to(model_folder)
    assert ModelFolder.open(BUILT_IN).config.name == "random"
    assert ModelFolder.open(BUILT_IN).source == BUILT_IN
    assert ModelFolder.open().config.name == BUILT_IN


def test_the_name_of_an_earlier_built_in_model_is_told():
    with pytest.raises(
        UserError, match="no model folder stickers: the built-in model is fluent now"
    ):
        ModelFolder.open("stickers")


@pytest.fixture
def offline_cache(model_folder, tmp_path, monkeypatch):
    """A Hugging Face cache that holds the model as `someone/random`, and no network."""
    write_hub_cache(tmp_path, model_folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_repository_loads_from_the_cache_when_offline(offline_cache, components):
    for revision in (None, "main", COMMIT):
        folder = ModelFolder.open("someone/random", revision=revision)
        assert (folder.source, folder.revision) == ("someone/random", COMMIT)
        assert_same_weights(load_pretrained(folder).transformer, components.transformer)


def test_offline_and_not_cached_is_one_line(offline_cache):
    for repo, revision in (("someone/else", None), ("someone/random", "v2")):
        with pytest.raises(UserError, match="not in the cache") as error:
            load_pretrained(repo, revision=revision)
        assert repo in str(error.value)
        assert "\n" not in str(error.value)


def test_a_network_that_fails_falls_back_to_the_cache(offline_cache, components, monkeypatch):
    real = huggingface_hub.snapshot_download

    def broken(*args, local_files_only=False, **kwargs):
        if not local_files_only:
            raise RuntimeError("connection reset\nby peer")
        return real(*args, local_files_only=True, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    loaded = load_pretrained("someone/random")
    assert_same_weights(loaded.transformer, components.transformer)
    with pytest.raises(UserError, match="connection reset") as error:
        load_pretrained("someone/else")
    assert "\n" not in str(error.value)


def test_only_weights_configs_and_tokenizers_are_downloaded(monkeypatch, model_folder):
    """The config first, then, at the commit that was found, the rest."""
    asked = []

    def download(repo, *, tqdm_class=None, **kwargs):
        asked.append({"repo": repo, **kwargs})
        return str(model_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_pretrained("someone/random", revision="v1")
    assert asked == [
        {"repo": "someone/random", "revision": "v1", "allow_patterns": [*DESCRIPTIONS]},
        {
            "repo": "someone/random",
            "revision": model_folder.name,
            "allow_patterns": ["*.json", "*.safetensors", "*.model"],
        },
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RepositoryNotFoundError", "neither a folder here nor a repository"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("GatedRepoError", "is gated"),
    ],
)
def test_the_hub_saying_no_is_one_line(monkeypatch, name, message):
    kind = getattr(huggingface_hub.errors, name)

    def refuse(*args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=message):
        load_pretrained("someone/random", revision="v9")


# --- quantization at run time -------------------------------------------------------------------


def test_quantizing_rounds_every_layer_that_divides(components):
    alone = extract(components.transformer, 0.5)
    before = flat_parameters(extract(components.transformer, 0.5))
    exact = velocity(alone)
    count = quantize_transformer(alone, 8)
    assert count > 0.8 * sum(v.size for v in before.values())
    rounded = velocity(alone)
    assert 0 < mx.abs(rounded - exact).max() < 0.1 * mx.abs(exact).max()
    if mx.default_device().type == mx.DeviceType.cpu:
        layer = alone.down_blocks[0].self_attention.q_proj
        assert isinstance(layer, ElasticLinear)
        old = before["down_blocks.0.self_attention.q_proj.weight"]
        expected = mx.dequantize(*mx.quantize(old, group_size=32, bits=8), group_size=32, bits=8)
        assert mx.array_equal(layer.weight, expected)
        # 16 channels do not divide into groups of 32
        assert mx.array_equal(alone.text[1].linear.weight, before["text.1.linear.weight"])


def test_packed_layers_compute_what_the_rounded_ones_do(components, monkeypatch):
    rounded = extract(components.transformer, 0.5)
    quantize_transformer(rounded, 4)
    packed = extract(components.transformer, 0.5)
    monkeypatch.setattr(model.mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    quantize_transformer(packed, 4)
    monkeypatch.undo()
    assert "scales" in packed.down_blocks[0].self_attention.q_proj
    assert mx.allclose(velocity(packed), velocity(rounded), atol=1e-4)


def test_what_cannot_be_quantized_says_why(components, monkeypatch):
    with pytest.raises(UserError, match="extract one width"):
        quantize_transformer(components.transformer, 4)
    alone = extract(components.transformer, 0.375)
    with pytest.raises(UserError, match="7 bits"):
        quantize_transformer(alone, 7)
    monkeypatch.setattr(runtime, "GROUP_SIZE", 128)
    with pytest.raises(UserError, match="groups of 128"):
        quantize_transformer(alone, 4)


def test_loading_a_width_the_model_lacks(copy):
    with pytest.raises(UserError, match=r"not 0\.25"):
        load_pretrained(copy, share=0.25)


def test_saving_does_not_import_a_hub_client(model_folder):
    code = (
        "import sys; from mlx_snapgen.checkpoint.model import load_pretrained; "
        f"load_pretrained({str(model_folder)!r}); assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=hub.Path(hub.__file__).parents[2])


def test_the_parts_of_a_folder_are_those_with_weights_in_it(model_folder):
    folder = ModelFolder.open(model_folder)
    every = ["transformer", "autoencoder", "text_encoder_0", "text_encoder_1"]
    assert list(folder.parts) == every
    elsewhere = dataclasses.replace(folder.config.text_encoders[0], source="owner/name")
    encoders = (elsewhere, *folder.config.text_encoders[1:])
    config = dataclasses.replace(folder.config, text_encoders=encoders)
    other = dataclasses.replace(folder, config=config)
    assert list(other.parts) == [name for name in every if name != "text_encoder_0"]
