"""Files, paths and text of unknown origin, at the places where all commands read them."""

import dataclasses
import functools
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import pytest
from PIL import Image

from apps.desktop.history import open_image
from mlx_snapgen import generate
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import save_pretrained
from mlx_snapgen.checkpoint.module import load_weights
from mlx_snapgen.checkpoint.t5 import t5_config
from mlx_snapgen.cli.options import Parser
from mlx_snapgen.cli.prompts_file import read_prompts
from mlx_snapgen.config import ModelConfig, SamplerConfig, TransformerConfig
from mlx_snapgen.errors import MOST_CHARACTERS, UserError, plural, shown_bytes
from mlx_snapgen.files import check_link, expanded, new_folder
from mlx_snapgen.formats import DESCRIPTIONS
from mlx_snapgen.json_values import check_sizes, from_dict
from mlx_snapgen.lora.adapters import adapted_layers
from mlx_snapgen.lora.files import load_lora, lora_words, read_lora, save_lora
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.text_encoders.clip import ClipTokenizer
from mlx_snapgen.open_model import open_model
from mlx_snapgen.picture_files import picture_size
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.public.source import find_source
from mlx_snapgen.public_config import Flux2TransformerConfig, T5Config
from mlx_snapgen.reading import MOST_DEPTH, parse_json, read_json
from mlx_snapgen.settings import DrawSettings, ModelChoice
from mlx_snapgen.tensor_files import read_header
from tests.layout.graph import ROOT
from tests.tiny import MODEL, TRANSFORMER, add_random_lora
from train.data.imagefolder import read_picture as read_training_picture
from train.data.shards import Shard
from train.loop.run import claim, recorded

# --- JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b"[" * (MOST_DEPTH + 1) + b"]" * (MOST_DEPTH + 1), "nested too deep"),
        (b"9" * 5000, "a number of 5000 digits"),
        (b"1" + b"0" * 55, "a number of 56 digits"),
        (b"1e999", "no finite number"),
        (b"NaN", "no finite number"),
        (b'["\\ud800"]', "half of a surrogate pair"),
        (b'"caf\xe9"', "not UTF-8"),
        (b"{", "cannot read a.json"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_json(text, "a.json")


def test_json_that_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, "\\ud83d\\ude00"]}')
    assert read_json(path) == {"a": [1, 2.5, "\U0001f600"]}
    assert isinstance(parse_json("[" * MOST_DEPTH + "]" * MOST_DEPTH, ""), list)
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        read_json(tmp_path / "b.json")
    with pytest.raises(UserError, match="Is a directory"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, [], "ModelConfig must be an object"),
        (ModelConfig, {"image_size": [32]}, "'image_size' takes 2 values, not 1"),
        (ModelConfig, {"image_size": 32}, "'image_size' must be a list"),
        (ModelConfig, {"name": 3}, "'name' must be a text"),
        (ModelConfig, {"transformer": 3}, "TransformerConfig must be an object"),
        (TransformerConfig, {"blocks": [1, 10**55, 1]}, "'blocks' must be 0 to"),
        (TransformerConfig, {"blocks": [1, 10**5, 1]}, "0 to 256 layers"),
        (TransformerConfig, {"hidden_size": True}, "must be a whole number, not true"),
        (TransformerConfig, {"patch_size": 0}, "'patch_size' must be 1 to"),
        (TransformerConfig, {"head_dim": 64.0}, "'head_dim' must be a whole number"),
        (TransformerConfig, {"widths": [1.0, 0.5, -0.375]}, "widths must start with 1.0 and fall"),
        (TransformerConfig, {"ffn_ratio": [4.0, -3.0, 4.0]}, "ffn_ratio takes numbers up to 100"),
        (Flux2TransformerConfig, {"mlp_ratio": -3.0}, "mlp_ratio takes numbers up to 100"),
        (Flux2TransformerConfig, {"mlp_ratio": 1e8}, "mlp_ratio takes numbers up to 100"),
        (SamplerConfig, {"guidance_scale": 1e300}, "'guidance_scale' must be at most"),
        (SamplerConfig, {"guidance_scale": float("nan")}, "'guidance_scale' must be at most"),
        (SamplerConfig, {"time_shift": "x"}, "'time_shift' must be a number"),
        (T5Config, {"norm_eps": 0}, "'norm_eps' must be above 0, not 0"),
        (T5Config, {"norm_eps": -1e-6}, "'norm_eps' must be above 0, not -1e-06"),
        (Flux2TransformerConfig, {"rope_theta": 0.0}, "'rope_theta' must be above 0, not 0.0"),
    ],
)
def test_values_of_a_config_have_types_and_ranges(kind, values, message):
    with pytest.raises(UserError, match=message):
        from_dict(kind, values)


def test_a_public_config_names_its_own_key():
    values = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 0}
    values |= dict.fromkeys(("d_model", "num_layers", "num_heads", "d_kv", "d_ff"), 8)
    with pytest.raises(UserError, match=r"x\.json: 'layer_norm_epsilon' must be above 0, not 0"):
        t5_config(values | {"vocab_size": 8}, Path("x.json"))
    with pytest.raises(UserError, match="'rope_theta' must be above 0"):
        check_sizes({"rope_parameters": {"rope_theta": 0}}, "config.json")


def test_none_and_whole_numbers_are_good_where_they_are_meant():
    assert from_dict(SamplerConfig, {"time_shift": None}).time_shift is None
    assert from_dict(SamplerConfig, {"guidance_scale": 4}).guidance_scale == 4


# --- text -------------------------------------------------------------------------------------


def test_a_message_is_one_short_line():
    message = str(UserError("no file " + "x" * 5000 + "\n\x1b[2J\u2028 \ud800 end"))
    assert len(message) <= MOST_CHARACTERS and message.isprintable()
    assert message.startswith("no file xxx") and message.endswith("\\ud800 end")
    assert str(UserError("short")) == "short"


MARKED = b"\xef\xbb\xbf# a comment\r\na red apple\xe2\x80\xa8and a cat\r\n\n\xef\xbb\xbfa dog\n"
PROMPTS = ["a red apple\u2028and a cat", "a dog"]
READ = """import sys; from mlx_snapgen.cli.prompts_file import read_prompts
print(ascii(list(read_prompts(*sys.argv[1:]))))"""


def test_a_list_of_prompts_is_the_same_from_a_file_and_from_the_input(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(MARKED)
    assert list(read_prompts(path)) == PROMPTS
    done = subprocess.run(
        [sys.executable, "-c", READ, "-"], cwd=ROOT, input=MARKED, capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == ascii(PROMPTS)
    path.write_bytes(b"a red apple\na caf\xe9\n")
    with pytest.raises(UserError, match="line 2: it is not UTF-8"):
        list(read_prompts(path))


def test_a_line_without_end_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_snapgen.reading.MOST_LINE", 40)
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n" + 39 * "a" + "\n")
    assert list(read_prompts(path)) == ["a cat", 39 * "a"]
    path.write_text("a cat\n" + 41 * "a" + "\n")
    with pytest.raises(UserError, match=r"prompts.txt: a line has more than"):
        list(read_prompts(path))


def test_a_prompt_of_another_encoding_is_refused():
    with pytest.raises(UserError, match="the negative prompt has characters"):
        DrawSettings("a cat", negative_prompt="caf\udce9").resolved(MODEL)


def test_one_thing_is_singular():
    counts = [plural(count, "picture") for count in (0, 1, 2, 1200)]
    assert counts == ["0 pictures", "1 picture", "2 pictures", "1,200 pictures"]


def test_a_size_is_shown_with_a_digit_that_is_not_0():
    sizes = [shown_bytes(count) for count in (0, 1, 512.4, 4_500, 120e6, 6_240_000_000)]
    assert sizes == ["0 bytes", "1 byte", "512 bytes", "4.5 kB", "120.0 MB", "6.2 GB"]


# --- paths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "/".join(["y" * 200] * 30)])
def test_a_path_that_the_system_refuses_is_one_line(path):
    with pytest.raises(UserError, match="cannot use"):
        expanded(path)
    parser = Parser()
    parser.add_argument("--output", type=Path)
    with pytest.raises(UserError, match="cannot use"):
        parser.parse_args([f"--output={path}"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_of_another_user_is_one_line(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match="Permission denied"):
        expanded(tmp_path / "closed" / "a.png")


def test_the_home_folder_is_expanded_after_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser()
    parser.add_argument("--output")
    parser.add_argument("--text")
    args = parser.parse_args(["--output=~/a/", "--text=~5 cats"])
    assert (args.output, args.text) == (f"{tmp_path}/a/", "~5 cats")


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_names_that_are_not_utf8(model_folder, components, monkeypatch, tmp_path, capsys):
    """Of a model, a LoRA, a picture and a run: read, written and recorded."""
    monkeypatch.chdir(tmp_path)
    model, lora, picture, copy = (os.fsdecode(b"\xff" + name) for name in (b"m", b"l", b"p", b"c"))
    shutil.copytree(model_folder, model)
    lora += ".safetensors"
    network = EfficientDiT(TRANSFORMER)
    add_random_lora(network)
    save_lora(lora, network, name="style")
    Image.new("RGB", (64, 32)).save(f"{picture}.png")
    asked = ["--lora", lora, "--image", f"{picture}.png", "--json", "-o", f"{copy}.png"]
    monkeypatch.setattr(sys, "argv", ["", "a red apple", "--model", model, *asked])
    generate.main()
    assert Image.open(f"{copy}.png").size == (64, 32)
    assert read_metadata(f"{copy}.png")["image"]["name"] == "?p.png"
    save_pretrained(copy, components)
    named = dataclasses.replace(components.config, name=copy)
    save_pretrained("named", dataclasses.replace(components, config=named))
    assert [ModelFolder.open(name).config.name for name in (copy, "named")] == ["random", "?c"]
    folder = Path(picture)
    claim(folder, {"data": {"where": copy}})
    assert recorded(folder) == {"data": {"where": copy}}


def test_two_dashes_are_no_value():
    """`argparse` would leave them out, and take the option for one without a value."""
    parser = Parser()
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--name")
    parser.add_argument("words", nargs="*")
    for name in ("--data", "--name"):
        with pytest.raises(UserError, match=f"argument {name}: '--' is not a value"):
            parser.parse_args([f"{name}=--"])
    assert parser.parse_args(["--name=-", "--", "-x"]).words == ["-x"]


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    link = tmp_path / "weights.safetensors"
    link.symlink_to("/nowhere/weights")
    for read in (check_link, load_weights):
        with pytest.raises(UserError, match="is a link to /nowhere/weights, which does not exist"):
            read(link)


def test_a_circle_of_links_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        expanded(tmp_path / "loop" / "a.png")


def test_a_source_that_cannot_be_read_is_not_called_an_output(tmp_path):
    message = "cannot read /nowhere/a: No such file"
    with pytest.raises(UserError, match=message), new_folder(tmp_path / "out"):
        Path("/nowhere/a").read_bytes()
    assert not (tmp_path / "out").exists()


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    before = os.getcwd()
    os.chdir(path.parent)  # an address has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def make_device(path):
    path.symlink_to("/dev/zero")


READERS = {
    "JSON": read_json,
    "tensors": read_header,
    "settings of a picture": read_metadata,
    "picture": picture_size,
    "prompts": read_prompts,
    "picture to show": open_image,
    "tokenizer": lambda path: ClipTokenizer.from_file(path, 8),
    "model": lambda path: open_model(ModelChoice(str(path))),
    "LoRA": read_lora,
    "training picture": read_training_picture,
    "shard": Shard,
    "specification": lambda path: find_source(str(path)),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (make_pipe, "it is a pipe, not a file"),
        (make_socket, "it is a socket, not a file"),
        (make_device, "it is a device, not a file"),
        (Path.mkdir, "Is a directory"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_before_it_blocks(tmp_path, reader, make, what):
    path = tmp_path / "x.safetensors"
    make(path)
    named = {"model", "LoRA", "specification"}
    with pytest.raises(UserError, match=None if reader in named else what):
        READERS[reader](path)


def open_pipe():
    read, write = os.pipe()
    return read, functools.partial(os.close, write), write


def open_socket():
    read, write = (end.detach() for end in socket.socketpair())
    return read, functools.partial(os.close, write), write


def open_terminal():
    terminal, user = pty.openpty()
    return user, functools.partial(os.write, terminal, b"\x04"), terminal  # Ctrl-D


@pytest.mark.timeout(20)
@pytest.mark.parametrize("opened", [open_pipe, open_socket, open_terminal])
@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", None])
def test_what_is_open_has_prompts_whatever_its_kind(name, opened):
    read, end, write = opened()
    os.write(write, b"a red apple\n")
    if name is None:  # a shell's <(command)
        end()
        assert list(read_prompts(f"/dev/fd/{read}")) == ["a red apple"]
    else:
        command = [sys.executable, "-c", READ, name]
        process = subprocess.Popen(command, cwd=ROOT, stdin=read, stdout=subprocess.PIPE)
        end()
        assert process.communicate()[0].decode().strip() == "['a red apple']"
    os.close(read)
    os.close(write) if opened is open_terminal else None


@pytest.mark.timeout(20)
def test_a_file_that_is_open_is_read_from_its_start(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\na cat\n")
    with open(path) as file:
        for _ in range(2):  # to count them, and to draw them
            assert list(read_prompts(f"/dev/fd/{file.fileno()}")) == ["a red apple", "a cat"]


def test_every_file_is_opened_where_pipes_are_refused():
    """Except files of this package and of the system, and those in hidden folders of its own."""
    own = {
        *("mlx_snapgen/settings.py", "mlx_snapgen/public/stream.py", "mlx_snapgen/_blas.py"),
        *("mlx_snapgen/public/convert.py", "mlx_snapgen/cli/prompts_file.py"),
        *("train/data/index.py", "train/data/stickers/vocabulary.py"),
        *("train/data/stickers/render.py", "train/loop/distributed.py"),
        *("apps/desktop/pictures.py", "apps/desktop/system.py"),
    }
    opened = r'\bopen\([^)]*"r?b?"\)|\.read_(bytes|text)\(|(Image|gzip)\.open\(path|np\.load\('
    found = {
        str(path.relative_to(ROOT))
        for name in ("mlx_snapgen", "train", "convert", "apps")
        for path in ROOT.glob(f"{name}/**/*.py")
        if re.search(opened, path.read_text(encoding="utf-8")) and "parity" not in path.parts
    }
    assert found <= own


# --- what a command prints --------------------------------------------------------------------


def command(body):
    """Arguments of a process whose `main` is this expression."""
    code = f"from mlx_snapgen.errors import run_command; run_command(lambda: {body})"
    return [sys.executable, "-c", code]


def test_a_current_folder_that_is_gone_is_one_line(tmp_path):
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', tmp_path / "gone", *command("print(1)")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the current folder is gone (")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_ends_the_command_quietly():
    with subprocess.Popen(
        command("print('x\\n' * 10**6)"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_command_without_standard_streams_ends_as_with_them(tmp_path, closed):
    """MLX cannot open a file as number 0, and Python has no stream for a closed number."""
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones(3)})
    code = f"""
from pathlib import Path
from mlx_snapgen.errors import UserError, run_command

def main():
    from mlx_snapgen.tensor_files import load_tensors
    found = load_tensors(Path({str(path)!r}))["a"].sum().item()
    print(found)
    raise UserError(found)

run_command(main)
"""
    close = " ".join(f"{number}>&-" for number in closed)
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {close}', sys.executable, code],
        cwd=ROOT,
        capture_output=True,
    )
    assert done.returncode == 2
    assert done.stdout == (b"" if 1 in closed else b"3.0\n")
    assert done.stderr == (b"" if 2 in closed else b"error: 3.0\n")


INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mlx_snapgen.settings":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    "module", ["mlx_snapgen.generate", "train.export", "convert.to_torch", "apps.server"]
)
def test_ctrl_c_while_a_command_imports_has_no_traceback(tmp_path, module):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], env=environment, cwd=ROOT, capture_output=True
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


@pytest.mark.skipif(sys.platform != "linux", reason="MLX's compiler on Linux")
@pytest.mark.skipif(mx.default_device().type == mx.gpu, reason="no compiler for the CPU")
def test_ctrl_c_while_mlx_looks_for_its_compiler_is_not_lost(tmp_path):
    """The C library ignores SIGINT meanwhile, and other threads must not take it."""
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nkill -INT 0\n")
    compiler.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment.pop("OPENBLAS_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", "import mlx_snapgen.networks.layers; print('lost')"],
        env=environment,
        capture_output=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout) == (-signal.SIGINT, b"")


def test_no_destructor_can_swallow_ctrl_c():
    """Python ignores exceptions in `__del__`, a KeyboardInterrupt too."""
    files = [f for n in ("mlx_snapgen", "train", "apps") for f in ROOT.glob(f"{n}/**/*.py")]
    assert not [f for f in files if "def __del__" in f.read_text(encoding="utf-8")]


@pytest.mark.parametrize(("name", "is_beside"), [("train", False), ("other", True)])
def test_ctrl_c_in_a_program_of_others_stays_pythons(tmp_path, name, is_beside):
    """In a package of the same name as ours, and in one that is installed beside it."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("import mlx_snapgen")
    (tmp_path / name / "a.py").write_text("import signal; print(signal.getsignal(2))")
    if is_beside:
        (tmp_path / "mlx_snapgen").symlink_to(ROOT / "mlx_snapgen")
    environment = os.environ | {"PYTHONPATH": str(tmp_path if is_beside else ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", f"{name}.a"], env=environment, cwd=tmp_path, capture_output=True
    )
    assert b"default_int_handler" in done.stdout


def test_names_of_files_are_printed_whatever_their_bytes():
    done = subprocess.run(command("print('caf\\udce9')"), cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"caf\\udce9\n")


def test_a_file_that_the_system_refuses_is_one_line():
    done = subprocess.run(command("open('/nowhere/a')"), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: /nowhere/a: No such file or directory\n")


# --- models and LoRAs -------------------------------------------------------------------------


def test_another_kind_of_model_is_not_downloaded(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')

    def download(repo, *, allow_patterns, **_):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"is a transformer alone \(FluxTransformer2DModel\)"):
        ModelFolder.open("owner/other-model")
    assert asked == [list(DESCRIPTIONS)]


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "ZImagePipeline"}, r"public model \(ZImagePipeline\)"),
        (
            "teacher.json",
            {"kind": "flux2"},
            r"public model \(flux2\), which .* --teacher take",
        ),
        ("transformer/config.json", {"_class_name": "MiniT2IMMJiTModel"}, r"model \(MiniT2I\)"),
        ("config.json", {"_class_name": "AutoencoderKL"}, r"an autoencoder alone \(Autoencoder"),
        ("config.json", {"architectures": ["Qwen3ForCausalLM"]}, r"one part .* \(Qwen3ForCausalLM"),
        (
            "model_index.json",
            {"_class_name": "FluxPipeline"},
            "an mlx_snapgen model: no config",
        ),
        (
            "config.json",
            {"width": 3},
            "snapgen model: config.json has no format_version",
        ),
    ],
)
def test_a_folder_of_something_else_is_named(tmp_path, file, values, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        ModelFolder.open(tmp_path)


def test_the_folder_above_a_transformer_alone_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    (tmp_path / "transformer").mkdir()
    config = tmp_path / "transformer" / "config.json"
    config.write_text('{"_class_name": "ZImageTransformer2DModel"}')
    with pytest.raises(UserError, match=f"transformer alone .* whole model, {tmp_path}$"):
        open_model(ModelChoice(str(config.parent)))


def test_words_of_a_lora_are_known(model_folder, tmp_path):
    network = EfficientDiT(TRANSFORMER)
    add_random_lora(network)
    save_lora(tmp_path / "a.safetensors", network, name="style", words=["zorbo"])
    save_lora(tmp_path / "b.safetensors", network, name="style")
    assert lora_words(read_lora(tmp_path / "a.safetensors")[1]) == ["zorbo"]

    def notices(prompt, *loras):
        pairs = tuple((str(tmp_path / name), 1.0) for name in loras)
        pipeline = SnapGenPipeline.from_pretrained(model_folder, loras=pairs)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            pipeline.generate(prompt)
        return [str(w.message) for w in found if "names nothing" in str(w.message)]

    assert notices("a zorbo")
    assert not notices("a zorbo", "a.safetensors")
    assert notices("a blorp", "a.safetensors")
    assert not notices("a blorp", "b.safetensors")  # its words are not recorded


# --- LoRAs of PEFT ----------------------------------------------------------------------------


def write_peft(folder, **config):
    """A folder as PEFT writes it: alpha is in the config alone."""
    network = EfficientDiT(TRANSFORMER)
    add_random_lora(network, rank=4, alpha=4.0)
    path = folder / "adapter_model.safetensors"
    save_lora(path, network, name="style")
    tensors = {k: v for k, v in mx.load(str(path)).items() if not k.endswith(".alpha")}
    mx.save_safetensors(str(path), tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("config", "alpha"), [({}, 16.0), ({"use_rslora": True}, 32.0)])
def test_the_alpha_of_peft_is_beside_the_weights(config, alpha, tmp_path):
    path = write_peft(tmp_path, **config)
    for given in (path, tmp_path):
        network = EfficientDiT(TRANSFORMER)
        load_lora(given, network, name="style")
        alphas = {layer.adapters["style"].alpha for layer in adapted_layers(network).values()}
        assert alphas == {alpha}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "LOHA"}, "the kind 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "'pissa' has changed"),
        ({"lora_alpha": "16"}, "damaged header"),
    ],
)
def test_a_variant_of_peft_is_refused_by_name(config, message, tmp_path):
    path = write_peft(tmp_path, **config)
    network = EfficientDiT(TRANSFORMER)
    for given in (path, tmp_path):
        with pytest.raises(UserError, match=message):
            load_lora(given, network)


@pytest.mark.parametrize("dtype", ["F8_E5M2", "F4"])
def test_a_type_that_is_not_supported_is_named(dtype, tmp_path):
    path = write_peft(tmp_path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    next(v for k, v in header.items() if k != "__metadata__")["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    for read in (read_lora, load_weights):
        with pytest.raises(UserError, match=f"type {dtype}, which is not supported"):
            read(path)
