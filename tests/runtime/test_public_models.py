"""Public models behind the same door as ours: defaults, abilities, pictures."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert.sample_teacher import sample
from mlx_snapgen.description import Abilities
from mlx_snapgen.errors import UserError
from mlx_snapgen.generate import main
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.public_pipeline import PublicPipeline
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.teachers import folder as teacher_folder
from mlx_snapgen.teachers.config import KLEIN, KLEIN_BASE, LIGHTNING, TURBO, Z_IMAGE
from mlx_snapgen.teachers.draw import draw_public
from mlx_snapgen.teachers.folder import PROMPT_FORMATS, load_flow_teacher, load_network
from tests.tiny import (
    FLUX2,
    FLUX2_AUTOENCODER,
    TEACHER,
    Reader,
    write_lightning_lora,
    write_teacher,
)
from tests.tiny import Z_IMAGE as TINY_Z_IMAGE

KLEIN_TEACHER = dataclasses.replace(
    TEACHER,
    kind="flux2",
    transformer=FLUX2,
    autoencoder=FLUX2_AUTOENCODER,
    schedule=KLEIN,
    few_step=KLEIN,
)
Z_IMAGE_TEACHER = dataclasses.replace(
    TEACHER, kind="z-image", transformer=TINY_Z_IMAGE, schedule=TURBO, few_step=TURBO
)
MODELS = {
    "qwen-image": TEACHER,
    "lightning": dataclasses.replace(TEACHER, few_step=LIGHTNING),
    "z-image-turbo": Z_IMAGE_TEACHER,
    "z-image": dataclasses.replace(Z_IMAGE_TEACHER, schedule=Z_IMAGE, few_step=None),
    "klein": KLEIN_TEACHER,
    "klein-base": dataclasses.replace(KLEIN_TEACHER, schedule=KLEIN_BASE, few_step=None),
}
SIZE = ("--height", "32", "--width", "48", "--seed", "5")
pytestmark = pytest.mark.usefixtures("no_language_model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("public"), {}
    for name, config in MODELS.items():
        made[name] = write_teacher(root / name, config)
    path = made["lightning"] / "few_step.safetensors"
    write_lightning_lora(path, load_network(made["lightning"], MODELS["qwen-image"]))
    return made


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def drawn(folder, *options):
    main(["a red car", "--model", str(folder), "--output", "out/", *SIZE, *options])
    path = max(Path.cwd().glob("out/*.png"), key=lambda p: p.stat().st_mtime_ns)
    return np.array(Image.open(path)), read_metadata(path)


@pytest.mark.parametrize(
    ("name", "options", "settings"),
    [
        ("qwen-image", ("--steps", "2"), {"num_inference_steps": 2}),
        ("lightning", (), {"few_step": True}),
        ("lightning", ("--steps", "9"), {"num_inference_steps": 9}),
        ("z-image-turbo", ("--steps", "3"), {"num_inference_steps": 3}),
        ("z-image", ("--steps", "2", "--guidance", "3"), {"num_inference_steps": 2}),
        ("klein", (), {}),
        ("klein-base", ("--steps", "2"), {"num_inference_steps": 2}),
    ],
)
def test_the_command_draws_what_sample_teacher_draws(folders, name, options, settings):
    found, metadata = drawn(folders[name], *options)
    if "--guidance" in options:
        settings = settings | {"guidance_scale": 3.0}
    teacher, autoencoder = load_flow_teacher(folders[name])
    size = {"prompt": "a red car", "height": 32, "width": 48, "seed": 5}
    expected = sample(teacher, autoencoder, **size, **settings)
    assert np.array_equal(found, np.array(expected))
    again, _ = drawn(folders[name], *options)
    assert np.array_equal(found, again)
    assert metadata["model_name"] == MODELS[name].name
    assert metadata["model"] == str(folders[name]) and metadata["seed"] == 5


def test_defaults_are_the_models_own():
    found = {name: DrawSettings().resolved(config) for name, config in MODELS.items()}
    assert {
        name: (s.num_inference_steps, s.guidance_scale, s.few_step) for name, s in found.items()
    } == {
        "qwen-image": (50, 4.0, False),
        "lightning": (4, 1.0, True),
        "z-image-turbo": (8, 1.0, True),
        "z-image": (50, 5.0, False),
        "klein": (4, 1.0, True),
        "klein-base": (50, 4.0, False),
    }
    assert all((s.height, s.width) == (1024, 1024) for s in found.values())


def test_abilities_come_from_the_config_alone():
    guided = {name: config.abilities().guidance for name, config in MODELS.items()}
    assert [name for name, can in guided.items() if not can] == ["z-image-turbo", "klein"]
    assert not MODELS["lightning"].abilities(few_step=True).guidance
    assert [name for name, c in MODELS.items() if c.abilities().edit] == ["klein", "klein-base"]
    assert MODELS["klein-base"].abilities() == Abilities(
        attention_modulation=False,
        part_of_text_encoders=False,
        edit=True,
        any_size=True,
        batches=False,
    )


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("klein", ("--guidance", "4"), r"FLUX\.2 klein has no guidance: leave out .* scale 4"),
        ("klein", ("--negative-prompt", "blue"), r"FLUX\.2 klein takes no negative prompt"),
        ("z-image-turbo", ("--guidance", "2"), "Z-Image-Turbo has no guidance"),
        ("lightning", ("--guidance", "2"), "Qwen-Image in its few-step mode has no guidance"),
        ("qwen-image", ("--few-step",), "this model has no few-step mode"),
        ("klein", ("--height", "40"), "height must be a positive multiple of 16 pixels"),
        ("klein", ("--attention-modulation",), r"FLUX\.2 klein has no attention modulation"),
        ("klein", ("--batch-size", "4"), "draws pictures one by one: leave out --batch-size"),
        ("klein", ("--model-width", "tiny"), "no width 'tiny', only full"),
        ("klein", ("--lora", "x.safetensors"), r"no LoRA file x\.safetensors"),
        ("klein", ("--text-encoders", "clip"), "has one text encoder"),
        ("klein", ("--quantize", "4"), "convert it again with convert.teacher"),
        ("klein", ("--revision", "main"), "only a Hugging Face repository has revisions"),
        ("klein", ("--vocabulary",), "has no vocabulary.json"),
    ],
)
def test_what_a_model_cannot_do_is_one_line_before_it_is_loaded(
    folders, monkeypatch, name, options, hint
):
    monkeypatch.setattr("mlx_snapgen.public_pipeline.load_flow_teacher", None)
    with pytest.raises(UserError, match=hint) as error:
        main(["a red car", "--model", str(folders[name]), *options])
    assert "\n" not in str(error.value)


def test_the_prompt_loop_refuses_a_batch_at_once(folders, monkeypatch, capsys):
    lines = ("a red car", ":batch-size 4", ":batch-size 1", "a red cat")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    main(["--interactive", "--model", str(folders["klein"]), "--steps", "1", *SIZE])
    out, err = capsys.readouterr()
    assert "one by one: leave out :batch-size" in err and err.count("error") == 1
    assert "a-red-cat.png" in out


def test_a_negative_prompt_takes_the_place_of_the_empty_one(folders, capsys):
    options = ("--steps", "2", "--guidance", "3")
    plain, _ = drawn(folders["z-image"], *options)
    away, _ = drawn(folders["z-image"], *options, "--negative-prompt", "blue")
    assert np.abs(plain.astype(int) - away).max() > 2
    drawn(folders["z-image"], "--steps", "1", "--guidance", "1", "--negative-prompt", "blue")
    assert "negative prompt has no effect at a guidance scale of 1" in capsys.readouterr().err


def test_the_end_of_a_long_prompt_is_named(folders, monkeypatch, capsys):
    """Once for each prompt, also if its states are kept; not without guidance."""
    long = "car " * 256
    lines = (f"{long}and sun", f"{long}and sun", ":negative a red hat", ":guidance 2", "a cat")
    lines = (*lines, f":negative {long}or moon", "a cat", ":guidance 1", "a cat")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    options = (*SIZE, "--steps", "1", "--num-images", "2")
    main(["--interactive", "--model", str(folders["qwen-image"]), *options])
    notes = [line for line in capsys.readouterr().err.splitlines() if "longer than" in line]
    assert notes == [
        *["note: the prompt is longer than 1024 tokens, cut: 'and sun'"] * 2,
        "note: the negative prompt is longer than 1024 tokens, cut: 'or moon'",
    ]


@pytest.mark.parametrize(
    ("name", "prompts", "encoded"),
    [
        ("qwen-image", ("a cat", ""), {"a cat", " "}),
        ("qwen-image", ("", ""), {"", " "}),
        ("z-image", (" ", " \t"), {" ", " \t"}),
    ],
)
def test_prompts_are_encoded_as_they_are(folders, name, prompts, encoded, monkeypatch):
    """By the pipeline and by `draw_public`; without a negative prompt, the model's own is."""
    asked = set()

    class Recorder(Reader):
        def __call__(self, prompts):
            asked.update(prompts)
            return super().__call__(prompts)

    monkeypatch.setattr(teacher_folder, "load_qwen", lambda *_, **__: Recorder())
    monkeypatch.setattr(Recorder, "prompt_format", PROMPT_FORMATS[MODELS[name].kind])
    pipe, picture = SnapGenPipeline.from_pretrained(folders[name]), Image.new("RGB", (32, 32))
    settings = DrawSettings(prompts[0], negative_prompt=prompts[1], height=32, width=32)
    settings = dataclasses.replace(settings, num_inference_steps=1, guidance_scale=3.0)
    next(pipe.generate(settings, image=picture))
    assert asked == encoded
    asked.clear()
    teacher, _ = load_flow_teacher(folders[name])
    draw_public(teacher, prompts[:1], seeds=[0], settings=settings.resolved(teacher.config))
    assert asked == encoded


def test_the_text_encoder_is_freed_before_denoising_and_its_states_are_kept(folders, monkeypatch):
    pipe = SnapGenPipeline.from_pretrained(folders["klein"])
    assert isinstance(pipe, PublicPipeline)
    loads = []
    monkeypatch.setattr(
        "mlx_snapgen.public_pipeline.load_prompts", lambda *a, **k: loads.append(a) or encoder
    )
    encoder = pipe.teacher.prompts
    size = {"height": 32, "width": 32, "seed": 1}
    for step in pipe.generate("a red car", **size):
        assert pipe.teacher.prompts is None
        assert step.num_steps == 4 and step.preview().size == (32, 32)
    pictures = [np.array(pipe(prompt, **size)[0]) for prompt in ("a red car", "a cat", "a cat")]
    assert len(loads) == 1
    assert np.array_equal(pictures[1], pictures[2])
    assert not np.array_equal(pictures[0], pictures[1])
    kept = SnapGenPipeline.from_pretrained(folders["klein"], keep_text_encoders=True)
    kept("a red car", **size)
    assert kept.teacher.prompts is not None
    with pytest.raises(UserError, match=r"convert it with convert\.teacher"):
        kept.save_pretrained("elsewhere")


def test_interactive(folders, model_folder, monkeypatch, capsys):
    """Between models of both kinds; what a model cannot do is one line, and the loop goes on."""
    lines = [
        ":size 32x32",
        "a red car",
        ":guidance 3",
        ":edit photo.png",
        "a blue car",
        ":edit",
        f":model {folders['qwen-image']}",
        ":steps 2",
        "a green car",
        ":guidance",
        f":model {model_folder}",
        ":size 64x32",
        "a red apple",
    ]
    Image.new("RGB", (64, 64), "blue").save("photo.png")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    main(["--interactive", "--model", str(folders["klein"]), "--seed", "1", "--output", "loop/"])
    names = {p.stem for p in Path("loop").glob("*.png")}
    assert names == {"a-red-car", "a-blue-car", "a-green-car", "a-red-apple"}
    assert [p["name"] for p in read_metadata("loop/a-blue-car.png")["edit"]] == ["photo.png"]
    assert not read_metadata("loop/a-green-car.png").get("edit")
    assert "error: FLUX.2 klein has no guidance" in capsys.readouterr().err
