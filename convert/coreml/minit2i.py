"""Export MiniT2I to Core ML: its transformer, and its text encoder in float32."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.coreml.package import Network, check_space, line, write_package
from convert.libraries import import_coremltools
from mlx_snapgen.checkpoint.t5 import TOKENIZER
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import check_new, new_folder
from mlx_snapgen.formats import CONFIG
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.networks.text_encoders.t5 import T5PromptEncoder
from mlx_snapgen.public_config import MiniT2ITransformerConfig
from mlx_snapgen.teachers.folder import load_network, load_prompts, load_teacher_config


def export_minit2i(folder: Path, output: Path, *, target: str, precision: str) -> dict[str, Any]:
    """Write the networks of a folder of `convert.teacher` as Core ML packages.

    Args:
        output: folder to write; must not exist, or be empty.
        target, precision: see `ExportSettings`; the text encoder is float32.

    Returns:
        The contents of report.json.

    Raises:
        UserError: another model, no space, or an output folder that is not empty.
    """
    check_new(output)
    config = load_teacher_config(folder)
    if config.kind != "minit2i":
        raise UserError(f"{config.name} cannot be exported to Core ML, only MiniT2I can")
    check_space(output, 2 * sum(f.stat().st_size for f in folder.rglob("*.safetensors")) * 3)
    with announce("loading coremltools and PyTorch ..."):
        import_coremltools()
    prompts = load_prompts(folder, config, dtype=mx.float32)
    assert isinstance(prompts, T5PromptEncoder)
    network = load_network(folder, config, dtype=mx.float32)
    sizes: MiniT2ITransformerConfig = config.transformer
    packages = {
        "Transformer": (_transformer(network, sizes), precision),
        "TextEncoder": (_text_encoder(prompts, sizes.text_tokens), "float32"),
    }
    about = {"model": config.name, "target": target, "precision": precision}
    report: dict[str, Any] = about | {"packages": {}}
    with new_folder(output) as partial:
        for name, (made, stored) in packages.items():
            print(f"{name}: converting ...", flush=True)
            report["packages"][name] = found = write_package(
                partial / f"{name}.mlpackage",
                {"main": made},
                target=target,
                precision=stored,
                about=about,
                description=f"{config.name}: {name}",
            )
            print(line(name, found), flush=True)
        shutil.copyfile(folder / CONFIG, partial / "config.json")
        (partial / TOKENIZER).write_bytes(prompts.tokenizer.model)
        (partial / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def _tensors(module: Any) -> dict[str, Any]:
    import torch

    return {name: torch.tensor(np.array(x)) for name, x in flat_parameters(module).items()}


def _transformer(network: Any, sizes: MiniT2ITransformerConfig) -> Network:
    import torch

    from convert.pytorch.minit2i import MiniT2I, Velocity

    d, side, patch = sizes.hidden_size, sizes.image_size, sizes.patch_size
    values = {
        "image_size": side,
        "patch_size": patch,
        "in_channels": sizes.latent_channels,
        "txt_input_size": sizes.text_dims,
        "hidden_size": d,
        "cond_vec_size": 1,
        "depth_double": sizes.num_layers,
        "txt_preamble_depth": sizes.num_text_layers,
        "num_heads": sizes.num_heads,
        "head_dim": sizes.head_dim,
        "mlp_ratio": (sizes.mlp_size + 0.5) / d,
        "pca_channels": sizes.patch_dims,
        "prompt_length": sizes.text_tokens,
    }
    twin, weights = MiniT2I(values), _tensors(network)
    for name, kernel in (("proj1", patch), ("proj2", 1)):
        key = f"img_embedder.{name}.weight"
        matrix = weights[key].reshape(len(weights[key]), kernel, kernel, -1)
        weights[key] = matrix.permute(0, 3, 1, 2)
    del twin.t_embedder, twin.pooled_embedder
    twin.load_state_dict(weights)
    inputs = {
        "x_t": torch.randn(1, sizes.latent_channels, side, side),
        "t": torch.full((1,), 0.5),
        "text": torch.randn(1, sizes.text_tokens, sizes.text_dims),
        "mask": torch.ones(1, sizes.text_tokens),
    }
    return Network(Velocity(twin).eval(), inputs, ("velocity",))


def _text_encoder(prompts: T5PromptEncoder, length: int) -> Network:
    import torch

    from convert.pytorch.t5 import T5

    twin = T5(prompts.network.config, length).eval()
    twin.load_state_dict(_tensors(prompts.network))
    inputs = {"tokens": torch.zeros(1, length, dtype=torch.int32), "mask": torch.ones(1, length)}
    return Network(twin, inputs, ("text",))
