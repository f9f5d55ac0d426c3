"""A whole CLIP: preprocessing, layouts of public checkpoints, and parity with the original.

The parity tests need torch and transformers: `pip install -e ".[parity]"`.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_snapgen.checkpoint import clip_towers
from mlx_snapgen.checkpoint.clip_towers import load_clip_towers, sanitize
from mlx_snapgen.config import ClipConfig, PictureEncoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.clip import Clip, center_square
from mlx_snapgen.networks.layers import flat_parameters
from tests.runtime.test_clip import MERGES, PROMPTS, VOCAB_SIZE, hugging_face, open_clip
from tests.tiny import make_clip, randomize

PICTURE = PictureEncoderConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    mlp_size=80,
    patch_size=8,
    image_size=24,
    activation="gelu",
)


def make_towers() -> Clip:
    encoder = make_clip(MERGES, 48, num_heads=3)
    model = randomize(Clip(ClipConfig(encoder.config, PICTURE, 20), encoder.tokenizer), 7)
    model.logit_scale = mx.array(2.5)
    return model


@pytest.fixture(scope="module")
def clip():
    return make_towers()


def some_pictures(*sizes, seed=0):
    """Smooth uint8 pictures (H, W, 3) of the sizes, with a little noise."""
    rng = np.random.default_rng(seed)
    for height, width in sizes:
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        yield (large + rng.integers(-20, 21, large.shape)).clip(0, 255).astype(np.uint8)


def hugging_face_towers(clip):
    """The weights as `CLIPModel` names them."""
    found = hugging_face(clip.text_encoder)
    tower = clip.picture_encoder
    picture = hugging_face(tower, "vision_model.")
    named = {
        "class_embedding": "embeddings.class_embedding",
        "position_embedding": "embeddings.position_embedding.weight",
        "patch_embedding.weight": "embeddings.patch_embedding.weight",
    }
    for name, value in picture.items():
        name = name.removeprefix("vision_model.")
        if name == "patch_embedding.weight":
            value = value.transpose(0, 3, 1, 2)
        name = named.get(name, name)
        name = name.replace("pre_norm", "pre_layrnorm").replace("post_norm", "post_layernorm")
        found[f"vision_model.{name}"] = value
    found["text_projection.weight"] = clip.text_projection.weight
    found["visual_projection.weight"] = clip.picture_projection.weight
    return found | {"logit_scale": clip.logit_scale}


def open_clip_towers(clip, prefixes=("", "visual.", "", "")):
    """The weights as OpenCLIP names them; prefixes of text, picture, text projection, scale."""
    text, picture, projection, scale = prefixes
    found = open_clip(clip.text_encoder, text)
    for name, value in open_clip(clip.picture_encoder).items():
        if name == "patch_embedding.weight":
            name, value = "conv1.weight", value.transpose(0, 3, 1, 2)
        name = name.replace("pre_ln_", "ln_pre").replace("post_ln_", "ln_post")
        found[picture + name] = value
    found[f"{projection}text_projection"] = clip.text_projection.weight.T
    found[f"{picture}proj"] = clip.picture_projection.weight.T
    return found | {f"{scale}logit_scale": clip.logit_scale[None]}


LAYOUTS = {
    "CLIPModel": lambda c: (
        hugging_face_towers(c)
        | {
            "text_model.embeddings.position_ids": mx.arange(17),
            "vision_model.embeddings.position_ids": mx.arange(10),
        }
    ),
    "OpenCLIP": open_clip_towers,
    "OpenCLIP with a text tower of its own": lambda c: open_clip_towers(
        c, ("text.", "visual.", "text.", "")
    ),
    "OpenCLIP in training": lambda c: {
        f"module.{key}": value for key, value in open_clip_towers(c).items()
    },
    "TinyCLIP": lambda c: open_clip_towers(
        c,
        (
            "_text_encoder.module.",
            "_image_encoder.module.visual.",
            "_text_encoder.module.",
            "_logit_scale.module.",
        ),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_public_layout_gives_the_same_weights(clip, layout):
    found = sanitize(LAYOUTS[layout](clip))
    assert found.keys() == flat_parameters(clip).keys()
    for name, value in flat_parameters(clip).items():
        assert mx.array_equal(found[name], value), name


def test_another_picture_encoder_is_named(clip):
    with pytest.raises(UserError, match=r"'visual\.trunk\.x' belongs to no CLIP picture encoder"):
        sanitize(open_clip_towers(clip) | {"visual.trunk.x": mx.zeros(3)})


def write_folder(folder, clip, layout="hugging face"):
    """A public checkpoint of `clip`, as its library would store it."""
    folder.mkdir()
    (folder / "merges.txt").write_bytes(MERGES)
    if layout == "open clip":
        config = {
            "model_cfg": {
                "text_cfg": {"heads": 3},
                "vision_cfg": {"head_width": 8},
            },
            "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "interpolation": "bicubic"},
        }
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        path = folder / "open_clip_model.safetensors"
        mx.save_safetensors(str(path), open_clip_towers(clip))
        return folder
    config = {
        "text_config": {"num_attention_heads": 3, "hidden_act": "gelu"},
        "vision_config": {"num_attention_heads": 4, "hidden_act": "gelu"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), hugging_face_towers(clip))
    return folder


@pytest.mark.parametrize("layout", ["hugging face", "open clip"])
def test_public_folders_load(clip, tmp_path, layout):
    loaded = load_clip_towers(write_folder(tmp_path / "clip", clip, layout))
    assert loaded.config.text == clip.config.text
    mean = (0.5, 0.4, 0.3) if layout == "open clip" else PICTURE.mean
    assert loaded.config.picture == PictureEncoderConfig(**{**vars(PICTURE), "mean": mean})
    assert mx.allclose(loaded.embed_texts(PROMPTS), clip.embed_texts(PROMPTS), atol=1e-6)
    pictures = list(some_pictures((24, 31), (50, 24)))
    found, expected = loaded.embed_pictures(pictures), clip.embed_pictures(pictures)
    assert mx.allclose(found, expected, atol=1e-6).item() == (layout == "hugging face")


def test_a_text_tower_alone_is_one_line(clip, tmp_path):
    folder = write_folder(tmp_path / "a", clip)
    mx.save_safetensors(str(folder / "model.safetensors"), hugging_face(clip.text_encoder))
    with pytest.raises(UserError, match="holds no CLIP picture encoder: get a whole CLIP"):
        load_clip_towers(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="--kind clip-score"):
        load_clip_towers(folder)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("preprocess_cfg", "resize_mode", "squash", "resized by bicubic and squash"),
        ("vision_cfg", "pool_type", "avg", "pool_type 'avg' is of another network"),
        ("vision_cfg", "pool_type", "tok", None),
        ("vision_cfg", "norm_kwargs", {"eps": 1e-6}, "norm_kwargs '{'eps': 1e-06}' is of another"),
        ("text_cfg", "no_causal_mask", True, "'no_causal_mask' true is not supported"),
        ("text_cfg", "no_causal_mask", False, None),
    ],
)
def test_what_open_clip_does_in_another_way_is_refused(clip, tmp_path, part, name, value, message):
    folder = write_folder(tmp_path / "a", clip, "open clip")
    values = json.loads((folder / "open_clip_config.json").read_text())
    (values["model_cfg"].get(part) or values[part])[name] = value
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    if message is None:
        load_clip_towers(folder)
    else:
        with pytest.raises(UserError, match=message):
            load_clip_towers(folder)


def test_another_norm_is_refused(clip, tmp_path):
    path = write_folder(tmp_path / "a", clip, "hugging face") / "config.json"
    for part in ("text_config", "vision_config"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {part: values[part] | {"layer_norm_eps": 1e-6}}))
        with pytest.raises(UserError, match=r"config.json: 'layer_norm_eps' 1e-06 is not"):
            load_clip_towers(tmp_path / "a")
        path.write_text(json.dumps(values))


# --- preprocessing and embeddings ---------------------------------------------------------------


def test_a_picture_is_resized_by_its_shorter_side_and_cropped_in_the_center():
    (wide, tall) = some_pictures((48, 101), (77, 48))
    for picture in (wide, tall):
        height, width = picture.shape[:2]
        # 24 x 50 (50.5 rounded down), of which columns 13 to 36 are left; 38 x 24, rows 7 to 30.
        size = (50, 24) if width > height else (24, 38)
        whole = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        expected = whole[:, 13:37] if width > height else whole[7:31]
        assert np.array_equal(center_square(picture, 24), expected)
    # Offsets round to even, as torchvision's: (27 - 24) / 2 is 2.
    (picture,) = some_pictures((24, 27))
    assert np.array_equal(center_square(picture, 24), picture[:, 2:26])


def test_embeddings_have_norm_one_and_do_not_depend_on_the_batch(clip):
    pictures = list(some_pictures((24, 24), (60, 31)))
    both = clip.embed_pictures(pictures)
    assert both.shape == (2, 20)
    np.testing.assert_allclose(np.linalg.norm(np.array(both), axis=1), 1, rtol=1e-6)
    assert mx.allclose(both[1:], clip.embed_pictures(pictures[1:]), atol=1e-6)
    texts = clip.embed_texts(["a red apple", "the"])
    assert mx.allclose(texts[1:], clip.embed_texts(["the"]), atol=1e-6)
    # A text that fills all places ends with its end mark too.
    long = clip.embed_texts(["red " * 30])
    assert mx.array_equal(long, clip.embed_texts(["red " * 15]))


# --- parity -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="parity needs torch: pip install -e '.[parity]'")
    reason = "parity needs transformers: pip install -e '.[parity]'"
    return pytest.importorskip("transformers", reason=reason)


def original(transformers, *, activation, patch, side, layers=2):
    """transformers' CLIPModel with random weights, for the tokens of MERGES."""
    import torch

    torch.manual_seed(side)
    shared = {"hidden_act": activation, "num_hidden_layers": layers}
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "max_position_embeddings": 17,
        "bos_token_id": VOCAB_SIZE - 2,
        "eos_token_id": VOCAB_SIZE - 1,
        "pad_token_id": VOCAB_SIZE - 1,
    }
    vision = {
        "hidden_size": 36,
        "intermediate_size": 100,
        "num_attention_heads": 3,
        "image_size": side,
        "patch_size": patch,
    }
    config = transformers.CLIPConfig(
        text_config=text | shared, vision_config=vision | shared, projection_dim=20
    )
    model = transformers.CLIPModel(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.1)
        elif parameter.ndim:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def processor(transformers, side):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


@pytest.mark.parametrize(
    ("activation", "patch", "side"), [("quick_gelu", 8, 32), ("gelu", 7, 35), ("quick_gelu", 5, 25)]
)
def test_embeddings_and_logits_equal_those_of_transformers(
    transformers, tmp_path, activation, patch, side
):
    import torch

    theirs = original(transformers, activation=activation, patch=patch, side=side)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_bytes(MERGES)
    ours = load_clip_towers(tmp_path)
    # Sizes whose margins are even: for odd ones transformers rounds down, unlike OpenAI's CLIP.
    sizes = (side, side), (2 * side, 2 * side + 12), (side + 7, side + 7), (side + 6, side)
    pictures = list(some_pictures(*sizes))
    tokens, mask = ours.text_encoder.tokenize(PROMPTS)
    given = processor(transformers, side)([Image.fromarray(p) for p in pictures])["pixel_values"]
    given = torch.tensor(np.stack(given))
    np.testing.assert_allclose(
        ours.picture_encoder.preprocess(pictures), given.permute(0, 2, 3, 1), atol=1e-5
    )
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(np.array(tokens)),
            attention_mask=torch.tensor(np.array(mask)).long(),
            pixel_values=given,
        )
    found, texts = ours.embed_pictures(pictures), ours.embed_texts(PROMPTS)
    np.testing.assert_allclose(found, out.image_embeds, atol=1e-5)
    np.testing.assert_allclose(texts, out.text_embeds, atol=1e-5)
    scale = float(np.exp(np.array(ours.logit_scale)))
    logits = scale * found @ texts.T
    np.testing.assert_allclose(logits, out.logits_per_image, atol=1e-5 * scale)
    assert np.ptp(np.array(found), axis=0).max() > 0.05  # the pictures are told apart


def test_converted_it_is_the_same(clip, tmp_path):
    from mlx_snapgen.public.convert import convert
    from mlx_snapgen.public.source import find_source

    folder = write_folder(tmp_path / "in", clip)
    report = convert(find_source(str(folder)), tmp_path / "out", kind="clip-score")
    assert report["kind"] == "clip-score" and not report["keys"]["ignored"]
    loaded = load_clip_towers(tmp_path / "out")
    assert loaded.config == clip.config
    for name, value in flat_parameters(clip).items():
        assert mx.array_equal(flat_parameters(loaded)[name], value), name
    assert mx.array_equal(loaded.embed_texts(PROMPTS), clip.embed_texts(PROMPTS))
    assert clip_towers.read_part(tmp_path / "out", clip_towers.PART) is not None
