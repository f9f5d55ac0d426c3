"""Whole teachers against diffusers' pipelines: reading, guidance, schedule, autoencoder, LoRA."""

import copy
import json
import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import convert.teacher
from convert import sample_teacher
from convert.parity.originals import qwen_image_pipeline, relative_difference, z_image_pipeline
from mlx_snapgen import generate
from mlx_snapgen.checkpoint.language_models import load_qwen
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.text_encoders.qwen import QWEN_IMAGE, Z_IMAGE
from mlx_snapgen.public.teachers import TeacherParts, convert_teacher
from mlx_snapgen.sampling import denoise, get_noise
from mlx_snapgen.teachers.flow import shifted_levels
from mlx_snapgen.teachers.folder import load_flow_teacher

WHY = "parity with diffusers needs torch, diffusers and mlx-lm: pip install -e '.[parity]'"
for name in ("mlx_lm", "diffusers", "transformers"):
    pytest.importorskip(name, reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)

PROMPTS = ["a red car", "", "two cats: \u00e4, {} and <|im_end|>, on a table that is green"]


def converted(pipeline, folder):
    """(diffusers' pipeline, its folder, our teacher, its autoencoder)."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "public")
    convert_teacher(folder / "public", folder / "teacher")
    return pipeline, folder / "public", *load_flow_teacher(folder / "teacher")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return converted(qwen_image_pipeline(), tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def z_image(tmp_path_factory):
    return converted(z_image_pipeline(), tmp_path_factory.mktemp("z-image"))


def test_qwen_image_reads_as_its_pipeline_does(qwen, monkeypatch):
    """Both are held against float64 as well, so that a difference tells whose it is."""
    pipeline, _, teacher, _ = qwen
    prompt_format = teacher.prompts.prompt_format
    assert prompt_format.template == pipeline.prompt_template_encode
    assert prompt_format.dropped == pipeline.prompt_template_encode_start_idx
    assert prompt_format.max_length == pipeline.tokenizer_max_length
    expected, mask = pipeline.encode_prompt(PROMPTS)
    condition = teacher.encode(PROMPTS)
    length = expected.shape[1]
    np.testing.assert_array_equal(np.array(condition.mask)[:, :length], mask.numpy().astype(bool))
    assert condition.text.shape[1] % 32 == 0 and not condition.mask[:, length:].any()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "text_encoder", copy.deepcopy(pipeline.text_encoder).double())
        exact, _ = pipeline.encode_prompt(PROMPTS)
    assert exact.dtype == torch.float64
    assert relative_difference(expected, exact) < 1e-5
    assert relative_difference(condition.text[:, :length], exact) < 1e-5
    assert relative_difference(condition.text[:, :length], expected) < 1e-4
    empty, _ = pipeline.encode_prompt(" ")
    assert relative_difference(condition.empty_text[:, : empty.shape[1]], empty) < 1e-4


@pytest.mark.parametrize("kind", ["qwen", "z_image"])
def test_the_end_of_a_prompt_that_its_pipeline_ignores_is_known(kind, request):
    _, _, teacher, _ = request.getfixturevalue(kind)
    prompts, most = teacher.prompts, teacher.prompts.prompt_format.max_length
    long = " ".join(f"{i} cats" for i in range(most))
    cut = prompts.cut(long)
    tokens, mask = prompts.tokenize([long])
    kept = prompts._tokenizer.decode(tokens[0].tolist())
    assert mask.all() and len(cut) > 100
    assert kept.endswith(long.removesuffix(cut).strip()) and long.endswith(cut)
    # Only the end of the template does not fit.
    [row] = prompts.tokenize([""])[1].tolist()
    assert prompts.cut("a" * (most + prompts.prompt_format.dropped - sum(row) + 1)) == ""
    assert prompts.cut("") == ""


MLX = ("language_model.model.", "vision_tower.", "language_model.lm_head.")
NESTED = ("model.language_model.", "model.visual.", "lm_head.")


@pytest.mark.parametrize(("layout", "bits"), [(MLX, None), (MLX, 8), (NESTED, None)])
def test_language_models_are_read_in_other_layouts_too(qwen, tmp_path, layout, bits):
    """Keys as mlx-community and newer checkpoints have them, quantized perhaps."""
    _, public, teacher, _ = qwen
    folder = tmp_path / "text_encoder"
    shutil.copytree(public / "text_encoder", folder)
    shutil.copytree(public / "tokenizer", folder, dirs_exist_ok=True)
    weights = {}
    for key, value in mx.load(str(folder / "model.safetensors")).items():
        for old, new in zip(("model.", "visual.", "lm_head."), layout, strict=True):
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        if bits and "_proj.weight" in key and "vision" not in key and value.shape[1] % 32 == 0:
            parts = mx.quantize(value, group_size=32, bits=bits)
            names = (key, key.replace("weight", "scales"), key.replace("weight", "biases"))
            weights |= dict(zip(names, parts, strict=True))
        else:
            weights[key] = value
    assert all(any(key.startswith(prefix) for key in weights) for prefix in layout)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    if bits:
        config["quantization"] = {"bits": bits, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    prompts = load_qwen(folder, QWEN_IMAGE, dims=32)
    found, expected = prompts(PROMPTS)[0], teacher.encode(PROMPTS).text
    error = relative_difference(found, expected)
    assert 0 < error < 0.1 if bits else error < 1e-6
    with pytest.raises(
        UserError, match="holds a qwen2_5_vl, this teacher's text encoder is a qwen3"
    ):
        load_qwen(folder, Z_IMAGE, dims=32)
    with pytest.raises(UserError, match="gives states of 32, the teacher takes those of 48"):
        load_qwen(folder, QWEN_IMAGE, dims=48)


@pytest.mark.parametrize(("guidance", "steps"), [(4.0, 3), (1.0, 2)])
def test_qwen_image_draws_as_its_pipeline_does(qwen, guidance, steps):
    """Text to picture in numbers: every part at once."""
    pipeline, _, teacher, autoencoder = qwen
    noise = torch.randn(2, 4, 6, 10, generator=torch.manual_seed(3))
    settings = {
        "prompt": PROMPTS[:1] + PROMPTS[2:],
        "negative_prompt": [" ", " "] if guidance > 1 else None,
        "true_cfg_scale": guidance,
        "num_inference_steps": steps,
        "height": 48,
        "width": 80,
    }
    packed = pipeline._pack_latents(noise, 2, 4, 6, 10)
    expected = pipeline(**settings, latents=packed, output_type="latent").images
    picture = pipeline(**settings, latents=packed, output_type="pt").images

    condition = teacher.encode(settings["prompt"])
    shift = teacher.config.schedule.time_shift(15, steps)
    levels = shifted_levels(teacher.config.schedule, steps, time_shift=shift)

    def velocity(x_t, sigma):
        return teacher.velocity(x_t, mx.full((2,), sigma), condition, guidance_scale=guidance)

    start = mx.array(noise.permute(0, 2, 3, 1).numpy())
    *_, last = denoise(velocity, start, levels)
    latents = pipeline._unpack_latents(expected, 48, 80, 8)[:, :, 0].permute(0, 2, 3, 1)
    assert relative_difference(last.x_t, latents) < 1e-4
    drawn = mx.clip(autoencoder.decode(last.x_t) / 2 + 0.5, 0, 1)
    assert relative_difference(drawn, picture.permute(0, 2, 3, 1)) < 1e-4


SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize("kind", ["qwen", "z_image"])
def test_scaled_rotary_positions_are_those_of_transformers(kind, is_old, name, request, tmp_path):
    """Also in config.json of transformers 5, where mlx-lm does not look for those of a Qwen2.5."""
    pipeline, public, teacher, _ = request.getfixturevalue(kind)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(public / part, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    text["max_position_embeddings"] = 16
    if is_old:
        rope = text.pop("rope_parameters")
        text["rope_theta"], text["rope_scaling"] = rope.pop("rope_theta"), rope | SCALED[name]
    else:
        text["rope_parameters"] |= SCALED[name]
    path.write_text(json.dumps(config))
    pipeline = copy.copy(pipeline)
    pipeline.text_encoder = type(pipeline.text_encoder).from_pretrained(tmp_path).eval()
    [expected, *_] = pipeline.encode_prompt([PROMPTS[2]])[0]
    found = load_qwen(tmp_path, teacher.prompts.prompt_format, dims=32)([PROMPTS[2]])[0][0]
    assert relative_difference(found[: len(expected)], expected) < 1e-4
    before = teacher.encode([PROMPTS[2]]).text[0]
    assert relative_difference(before[: len(expected)], expected) > 0.01


def test_z_image_reads_as_its_pipeline_does(z_image):
    pipeline, _, teacher, _ = z_image
    expected, empty = pipeline.encode_prompt(PROMPTS.copy())
    condition = teacher.encode(PROMPTS)
    assert condition.mask.sum(axis=1).tolist() == [len(states) for states in expected]
    for found, states in zip(condition.text, expected, strict=True):
        assert relative_difference(found[: len(states)], states) < 1e-4
    assert relative_difference(condition.empty_text[0, : len(empty[0])], empty[0]) < 1e-4


@pytest.mark.parametrize(("guidance", "steps"), [(0.0, 3), (2.5, 2)])
def test_z_image_draws_as_its_pipeline_does(z_image, guidance, steps):
    """Its pipeline counts guidance from 0, this project from 1."""
    pipeline, _, teacher, autoencoder = z_image
    prompts = PROMPTS[:1] + PROMPTS[2:]
    noise = torch.randn(2, 4, 6, 10, generator=torch.manual_seed(3))
    settings = {"prompt": prompts, "guidance_scale": guidance, "num_inference_steps": steps}
    settings |= {"height": 48, "width": 80, "latents": noise}
    latents = pipeline(**copy.deepcopy(settings), output_type="latent").images
    picture = pipeline(**copy.deepcopy(settings), output_type="pt").images

    condition = teacher.encode(prompts)

    def velocity(x_t, sigma):
        return teacher.velocity(x_t, mx.full((2,), sigma), condition, guidance_scale=1 + guidance)

    start = mx.array(noise.permute(0, 2, 3, 1).numpy())
    shift = teacher.config.schedule.time_shift(15, steps)
    levels = shifted_levels(teacher.config.schedule, steps, time_shift=shift)
    *_, last = denoise(velocity, start, levels)
    assert relative_difference(last.x_t, latents.permute(0, 2, 3, 1)) < 1e-4
    drawn = mx.clip(autoencoder.decode(last.x_t) / 2 + 0.5, 0, 1)
    assert relative_difference(drawn, picture.permute(0, 2, 3, 1)) < 1e-4
    assert teacher.has_few_step and teacher.config.few_step.num_inference_steps == 8


def test_z_image_encodes_pictures_as_its_pipeline_does(z_image):
    pipeline, _, _, autoencoder = z_image
    pictures = torch.rand(2, 3, 40, 64, generator=torch.manual_seed(0)) * 2 - 1
    config = pipeline.vae.config
    expected = pipeline.vae.encode(pictures).latent_dist.mode()
    expected = (expected - config.shift_factor) * config.scaling_factor
    found = autoencoder.encode(mx.array(pictures.permute(0, 2, 3, 1).numpy()))
    assert relative_difference(found, expected.permute(0, 2, 3, 1)) < 1e-4


def test_commands_from_a_public_folder_to_a_picture(qwen, tmp_path, monkeypatch):
    """convert.teacher, then both commands that draw: the picture of diffusers' pipeline."""
    pipeline, public, *_ = qwen
    teacher, path = tmp_path / "teacher", tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["teacher", str(public), "--output", str(teacher)])
    convert.teacher.main()
    options = ["--height", "48", "--width", "80", "--steps", "2", "--seed", "7"]
    sample_teacher.main([str(teacher), "a red car", "--output", str(path), *options])
    noise = torch.tensor(np.array(get_noise(7, 6, 10, 4))).permute(0, 3, 1, 2)
    picture = pipeline(
        "a red car",
        negative_prompt=" ",
        true_cfg_scale=4.0,
        num_inference_steps=2,
        height=48,
        width=80,
        latents=pipeline._pack_latents(noise, 1, 4, 6, 10),
        output_type="np",
    ).images[0]
    with Image.open(path) as drawn:
        difference = np.abs(np.array(drawn) - 255 * picture)
        pixels = np.array(drawn)
    assert difference.max() < 0.6
    assert 255 * picture.std() > 20
    path = tmp_path / "generated.png"
    generate.main(["a red car", "--model", str(teacher), "--output", str(path), *options])
    assert np.array_equal(np.array(Image.open(path)), pixels)


def test_a_quantized_teacher_says_nearly_the_same(qwen, tmp_path):
    _, public, teacher, _ = qwen
    convert_teacher(public, tmp_path / "packed", quantization={"bits": 8, "group_size": 32})
    packed, _ = load_flow_teacher(tmp_path / "packed")
    assert "scales" in packed.network.transformer_blocks[0].img_mlp.net[0].proj
    assert "scales" not in packed.network.proj_out
    condition = teacher.encode(PROMPTS[:1])
    x_t, t = mx.random.normal((1, 4, 6, 4), key=mx.random.key(0)), mx.array([0.5])
    found, expected = (some.velocity(x_t, t, condition) for some in (packed, teacher))
    error = relative_difference(found, expected)
    assert 0 < error < 0.05
    with pytest.raises(UserError, match="exists already"):
        convert_teacher(public, tmp_path / "packed")


def test_what_is_missing_leaves_no_folder(qwen, tmp_path):
    _, public, *_ = qwen
    shutil.copytree(public, tmp_path / "public")
    shutil.rmtree(tmp_path / "public" / "tokenizer")
    with pytest.raises(UserError, match="it has no folder tokenizer"):
        convert_teacher(tmp_path / "public", tmp_path / "teacher")
    lora = {"transformer_blocks.0.attn.to_qq.lora_down.weight": mx.zeros((2, 32))}
    mx.save_safetensors(str(tmp_path / "lora.safetensors"), lora)
    with pytest.raises(UserError, match="is no layer of this one"):
        convert_teacher(
            public, tmp_path / "teacher", TeacherParts(few_step_lora=tmp_path / "lora.safetensors")
        )
    assert {path.name for path in tmp_path.iterdir()} == {"public", "lora.safetensors"}
