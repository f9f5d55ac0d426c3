"""CLIP's text tower: tokenizer, layouts of public checkpoints, and parity with the original.

The parity tests need torch and transformers: `pip install -e ".[parity]"`.
"""

import dataclasses
import gzip
import json

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest

from mlx_snapgen.checkpoint.clip import load_clip, sanitize
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import (
    load_pretrained,
    load_text_encoders,
    save_pretrained,
)
from mlx_snapgen.checkpoint.text_encoders import download_sources
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.networks.text_encoders.clip import ClipTextEncoder, ClipTokenizer
from mlx_snapgen.presets import TINYCLIP_19M
from tests.tiny import make_clip, states_error, with_text_encoder

MERGES = (
    "a p|p l|ap pl|l e</w>|appl e</w>|r e|re d</w>|t h|th e</w>|i n|in g</w>|1 2|' s</w>|"
    "! !|!! !</w>|Ã ©</w>|c a|ca f|caf Ã©</w>|o n|on e</w>|a n|an d</w>|x x|xx xx"
)
MERGES = MERGES.replace("|", "\n").encode()
VOCAB_SIZE = 512 + len(MERGES.split(b"\n")) + 2
PROMPTS = [
    "a red apple",
    "",
    "  The\tREDDER  apples, and 12 others!!! ",
    "it's one café, the cafe\u0301",
    "蘋果 ½ Ⅷ ٣4 naïve—ÀÉ x²  snow☃️",
    "xxxxxxxxx aaap appleapple ''s 'sing",
    "é",
]


@pytest.fixture(scope="module")
def encoder():
    return make_clip(MERGES, 48, num_heads=3)


def hugging_face(encoder, prefix="text_model."):
    """The encoder's weights as `CLIPTextModel` names them."""
    found = {}
    for name, value in flat_parameters(encoder).items():
        name = name.replace("token_embedding", "embeddings.token_embedding")
        name = name.replace("position_embedding", "embeddings.position_embedding.weight")
        if name.startswith("norm"):
            name = f"final_layer_{name}"
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            rest = rest.replace("norm", "layer_norm").replace("linear", "mlp.fc")
            rest = rest.replace("out_proj", "self_attn.out_proj")
            name = f"encoder.layers.{i}.{rest}"
        if "qkv_proj" in name:
            for part, x in zip(mx.split(value, 3), "qkv", strict=True):
                found[prefix + name.replace("qkv_proj", f"self_attn.{x}_proj")] = part
        else:
            found[prefix + name] = value
    return found


def open_clip(encoder, prefix=""):
    """The encoder's weights as OpenCLIP names them."""
    found = {}
    for name, value in flat_parameters(encoder).items():
        name = name.replace("position_embedding", "positional_embedding")
        if name.startswith("norm"):
            name = name.replace("norm", "ln_final")
        name = name.replace("layers.", "transformer.resblocks.").replace("norm", "ln_")
        name = name.replace("qkv_proj.", "attn.in_proj_").replace("out_proj", "attn.out_proj")
        name = name.replace("linear1", "mlp.c_fc").replace("linear2", "mlp.c_proj")
        found[prefix + name] = value
    return found


# --- tokenizer ----------------------------------------------------------------------------------


def test_ids_are_those_of_clip():
    """The 256 bytes and their ends of words have the same ids in every CLIP: "a" is 320."""
    tokenizer = ClipTokenizer(b"", 77)
    assert tokenizer.encode("! a") == [256, 320]
    assert tokenizer.encode("ab") == [64, 321]
    assert tokenizer.vocab_size == 514


def test_merges_join_the_earliest_pair_first():
    tokenizer = ClipTokenizer(MERGES, 17)
    names = [tokenizer.vocabulary[i] for i in tokenizer.encode("Apple appl red, reddd")]
    assert names == ["apple</w>", "ap", "p", "l</w>", "red</w>", ",</w>", "re", "d", "d", "d</w>"]


def test_a_prompt_is_padded_on_the_right_between_its_marks(encoder):
    tokens, mask = encoder.tokenize(["", "red apple"])
    begin, end = VOCAB_SIZE - 2, VOCAB_SIZE - 1
    red, apple = encoder.tokenizer.encode("red apple")
    assert tokens[0].tolist() == [begin] + [end] * 16
    assert tokens[1, :5].tolist() == [begin, red, apple, end, end]
    assert mask.sum(axis=1).tolist() == [2, 4]


def test_a_long_prompt_keeps_its_end_mark_and_tells_what_was_cut(encoder):
    prompt = "red " * 15 + "apple café"
    tokens, mask = encoder.tokenize([prompt])
    assert tokens[0, -1].item() == VOCAB_SIZE - 1
    assert mask.all()
    assert encoder.tokenizer.cut(prompt) == "apple café"
    assert encoder.tokenizer.cut("red apple") == ""
    assert encoder.tokenizer.unknown("蘋果") == []


def test_a_file_that_holds_no_merges_is_one_line(tmp_path):
    for data in (b"not a merge", b"\xff\xfe"):
        (tmp_path / "t.model").write_bytes(data)
        with pytest.raises(UserError, match="cannot read the tokenizer"):
            ClipTokenizer.from_file(tmp_path / "t.model", 77)


# --- network ------------------------------------------------------------------------------------


def test_the_preset_has_the_size_of_tinyclip():
    layers = 6 * (12 * 512**2 + 13 * 512)
    embeddings = (49408 + 77) * 512
    encoder = ClipTextEncoder(TINYCLIP_19M)
    assert sum(p.size for p in flat_parameters(encoder).values()) == layers + embeddings + 2 * 512
    assert layers == pytest.approx(19e6, rel=0.01)


def test_padding_changes_no_token_before_it(encoder):
    tokens, mask = encoder.tokenize(["the red apple"])
    count = mask.sum().item()
    assert mx.allclose(
        encoder(tokens, mask)[:, :count], encoder(tokens[:, :count], None), atol=1e-5
    )


def test_it_can_be_an_encoder_of_a_model_folder(components, encoder, tmp_path):
    made = with_text_encoder(components, encoder)
    save_pretrained(tmp_path / "m", made)
    loaded = load_pretrained(tmp_path / "m").text_encoders[1]
    assert loaded.config == encoder.config
    prompt = ["a red apple, one café"]
    assert mx.array_equal(loaded(*loaded.tokenize(prompt)), encoder(*encoder.tokenize(prompt)))


def test_a_repository_of_a_text_encoder_is_looked_up_once(
    components, encoder, tmp_path, monkeypatch
):
    """Also when the encoder is freed and loaded again."""
    (public := tmp_path / "public").mkdir()
    mx.save_safetensors(str(public / "model.safetensors"), hugging_face(encoder))
    (public / "merges.txt").write_bytes(MERGES)
    text = {"num_attention_heads": 3, "hidden_act": "gelu"}
    (public / "config.json").write_text(json.dumps({"text_config": text}))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **_: asked.append(repo) or public
    )
    config = dataclasses.replace(encoder.config, source="someone/clip")
    made = with_text_encoder(components, ClipTextEncoder(config, encoder.tokenizer))
    save_pretrained(tmp_path / "m", made)
    folder = ModelFolder.open(tmp_path / "m")
    download_sources(folder, lambda *_: None)
    for _ in range(2):
        loaded = load_text_encoders(folder)[1]
        assert np.array_equal(
            loaded(*loaded.tokenize(PROMPTS)), encoder(*encoder.tokenize(PROMPTS))
        )
    assert asked == ["someone/clip"]


def test_a_text_encoder_that_was_moved_is_named(components, encoder, tmp_path):
    config = dataclasses.replace(encoder.config, source=str(tmp_path / "clip"))
    made = with_text_encoder(components, ClipTextEncoder(config, encoder.tokenizer))
    save_pretrained(tmp_path / "m", made)
    words = r"the text encoder of .*/m: no model folder .*/clip; .* its source in m/config\.json$"
    with pytest.raises(UserError, match=words):
        load_pretrained(tmp_path / "m")


# --- public checkpoints -------------------------------------------------------------------------

PICTURE_SIDE = ("visual.conv1.weight", "logit_scale", "text_projection")
LAYOUTS = {
    "CLIPTextModel": lambda e: hugging_face(e),
    "CLIPTextModel without prefix": lambda e: hugging_face(e, ""),
    "CLIPModel": lambda e: (
        hugging_face(e)
        | {
            "text_model.embeddings.position_ids": mx.arange(17),
            "vision_model.post_layernorm.weight": mx.zeros(3),
            "visual_projection.weight": mx.zeros((3, 3)),
            "text_projection.weight": mx.zeros((3, 3)),
            "logit_scale": mx.array(1.0),
        }
    ),
    "OpenCLIP": lambda e: open_clip(e) | {k: mx.zeros(3) for k in PICTURE_SIDE},
    "OpenCLIP with a text tower of its own": lambda e: (
        open_clip(e, "text.") | {"attn_mask": mx.ones(3)}
    ),
    "OpenCLIP in training": lambda e: {
        f"module.{k}": v for k, v in (open_clip(e) | {PICTURE_SIDE[0]: mx.zeros(3)}).items()
    },
    "TinyCLIP": lambda e: (
        open_clip(e, "_text_encoder.module.")
        | {
            "_image_encoder.module.visual.proj": mx.zeros(3),
            "_logit_scale.module.logit_scale": mx.array(1.0),
            "_text_encoder.module.text_projection": mx.zeros((3, 3)),
        }
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_public_layout_gives_the_same_weights(encoder, layout):
    found = sanitize(LAYOUTS[layout](encoder))
    assert found.keys() == flat_parameters(encoder).keys()
    for name, value in flat_parameters(encoder).items():
        assert mx.array_equal(found[name], value), name


def test_a_key_that_fits_no_layout_is_named(encoder):
    with pytest.raises(UserError, match=r"'text_model\.pooler\.weight' belongs to no CLIP"):
        sanitize(hugging_face(encoder) | {"text_model.pooler.weight": mx.zeros(3)})
    weights = hugging_face(encoder)
    del weights["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(UserError, match="lacks its keys"):
        sanitize(weights)


def write_folder(folder, encoder, layout):
    """A public checkpoint of `encoder`, as its library would store it."""
    folder.mkdir()
    if layout == "hugging face":
        mx.save_safetensors(str(folder / "model.safetensors"), hugging_face(encoder))
        config = {"text_config": {"num_attention_heads": 3, "hidden_act": "gelu"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "merges.txt").write_bytes(b"#version: 0.2\n" + MERGES + b"\n")
    elif layout == "tokenizer.json":
        mx.save_safetensors(str(folder / "model.safetensors"), hugging_face(encoder, ""))
        config = {"model_type": "clip_text_model", "num_attention_heads": 3, "hidden_act": "gelu"}
        (folder / "config.json").write_text(json.dumps(config))
        merges = [m.split(" ") for m in MERGES.decode().split("\n")]
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"merges": merges}}))
    else:
        mx.save_safetensors(str(folder / "open_clip_model.safetensors"), open_clip(encoder))
        config = {"model_cfg": {"text_cfg": {"heads": 3}}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        # OpenAI's file goes on after what the vocabulary uses.
        data = b"bpe_simple_vocab_16e6.txt#version: 0.2\n" + MERGES + b"\nq u\nqu i\n"
        (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(data))
    return folder


@pytest.mark.parametrize("layout", ["hugging face", "tokenizer.json", "open clip"])
def test_public_folders_load(encoder, tmp_path, layout):
    loaded = load_clip(write_folder(tmp_path / "clip", encoder, layout))
    assert loaded.config == encoder.config
    assert mx.array_equal(loaded.tokenize(PROMPTS)[0], encoder.tokenize(PROMPTS)[0])
    tokens, mask = encoder.tokenize(PROMPTS)
    assert mx.array_equal(loaded(tokens, mask), encoder(tokens, mask))


def test_public_folders_that_do_not_fit_are_one_line(encoder, tmp_path):
    folder = write_folder(tmp_path / "a", encoder, "hugging face")
    (folder / "merges.txt").write_bytes(MERGES[:-10])
    with pytest.raises(UserError, match=f"the network {VOCAB_SIZE}"):
        load_clip(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_clip(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="cannot read"):
        load_clip(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), {"logit_scale": mx.array(1.0)})
    with pytest.raises(UserError, match="holds no CLIP text encoder"):
        load_clip(folder)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="is truncated"):
        load_clip(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load_clip(folder)


@pytest.mark.parametrize(
    ("layout", "name", "value"),
    [
        ("hugging face", "layer_norm_eps", 1e-6),
        ("tokenizer.json", "layer_norm_eps", 1e-6),
        ("open clip", "no_causal_mask", True),
        ("open clip", "norm_kwargs", {"eps": 1e-6}),
    ],
)
def test_settings_of_another_network_are_refused(encoder, tmp_path, layout, name, value):
    folder = write_folder(tmp_path / "a", encoder, layout)
    [path] = folder.glob("*config.json")
    values = json.loads(path.read_text())
    text = values.get("model_cfg", {}).get("text_cfg") or values.get("text_config", values)
    text[name] = value
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"'{name}' .* is not supported") as error:
        load_clip(folder)
    assert str(error.value).startswith(f"{path}: ")


def test_a_missing_layer_is_named(encoder, tmp_path):
    folder = write_folder(tmp_path / "a", encoder, "hugging face")
    weights = hugging_face(encoder)
    del weights["text_model.encoder.layers.1.mlp.fc1.bias"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(UserError, match=r"lacks layers\.1\.linear1\.bias"):
        load_clip(folder)


# --- parity -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="parity needs torch: pip install -e '.[parity]'")
    reason = "parity needs transformers: pip install -e '.[parity]'"
    return pytest.importorskip("transformers", reason=reason)


@pytest.mark.parametrize(
    ("activation", "heads", "length", "lengths"),
    [("gelu", 3, 17, (17, 5, 2)), ("quick_gelu", 2, 13, (1, 13, 7)), ("gelu", 4, 7, (7,))],
)
def test_states_equal_those_of_transformers(
    transformers, tmp_path, activation, heads, length, lengths
):
    import torch

    torch.manual_seed(length)
    config = transformers.CLIPTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=17,
        hidden_act=activation,
        initializer_factor=8.0,  # weights that are large enough to matter
        bos_token_id=VOCAB_SIZE - 2,
        eos_token_id=VOCAB_SIZE - 1,
        pad_token_id=VOCAB_SIZE - 1,
    )
    model = transformers.CLIPTextModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_bytes(MERGES)
    ours = load_clip(tmp_path)

    rng = np.random.default_rng(length)
    tokens = rng.integers(0, VOCAB_SIZE, (len(lengths), length))
    mask = np.arange(length) < np.array(lengths)[:, None]
    tokens[~mask] = VOCAB_SIZE - 1
    assert states_error(ours, model, tokens=tokens, mask=mask) < 1e-4


def test_tokens_equal_those_of_transformers(transformers, tmp_path):
    vocabulary = ClipTokenizer(MERGES, 17).vocabulary
    vocabulary = [*vocabulary, "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\n" + MERGES + b"\n")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path, model_max_length=17)
    ours = ClipTokenizer(MERGES, 17)
    for prompt in PROMPTS:
        expected = theirs(prompt, padding="max_length", truncation=True)
        tokens, mask = ours([prompt])
        assert tokens[0].tolist() == expected["input_ids"], prompt
        assert mask[0].tolist() == [bool(x) for x in expected["attention_mask"]], prompt
