"""Compare the outputs of each network with those of the library that it is ported from.

    python -m convert.parity
    python -m convert.parity --source my-clip --source Qwen-Image/vae

Without --source, the command compares small networks with random weights. With --source, it
compares the network of that checkpoint. The table lists the largest difference divided by the
largest value, in float32. The command needs the original libraries: pip install
"mlx_snapgen[parity]".
"""

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from convert.libraries import require
from convert.parity.autoencoders import (
    compare_dc_ae,
    compare_flux2_vae,
    compare_kl_vae,
    compare_qwen_image_vae,
    make_dc_ae,
    make_flux2_vae,
    make_kl_vae,
    make_qwen_image_vae,
)
from convert.parity.minit2i import (
    compare_minit2i,
    compare_minit2i_pictures,
    compare_t5,
    make_minit2i,
    make_t5,
    make_whole_minit2i,
)
from convert.parity.originals import relative_difference
from convert.parity.pictures import (
    compare_klein_edit,
    compare_klein_inpaint,
    compare_klein_prompt,
    compare_qwen_img2img,
    compare_qwen_inpaint,
    compare_qwen_prompt,
    compare_z_image_img2img,
    compare_z_image_inpaint,
    compare_z_image_prompt,
    make_kleins,
    make_whole_qwen_image,
    make_z_images,
)
from convert.parity.text_encoders import (
    compare_clip,
    compare_clip_towers,
    compare_gemma,
    make_clip,
    make_clip_towers,
    make_gemma,
)
from convert.parity.transformers import (
    Pairs,
    compare_flux2,
    compare_lora,
    compare_qwen_image,
    compare_z_image,
    make_flux2,
    make_lora,
    make_qwen_image,
    make_z_image,
)
from convert.pickles import spooled
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.public.kinds import find_kind
from mlx_snapgen.public.source import find_source

LIMIT = 1e-3
"""A larger relative difference is an error; float32 networks are at 1e-6 to 1e-5."""


@dataclass(frozen=True)
class Port:
    """A network here, and the original."""

    original: str
    packages: tuple[str, ...]
    make: Callable[[Path], None]
    """Writes the original with small random weights into a folder."""
    compare: Callable[[Path], Pairs]
    """Runs both on the checkpoint in a folder."""
    only_random: bool = False
    """The comparison needs more than a checkpoint."""


PIPELINES = ("torch", "diffusers", "transformers", "mlx_lm")
"""Packages for a whole pipeline."""

PORTS = {
    "clip": Port("transformers CLIPTextModel", ("torch", "transformers"), make_clip, compare_clip),
    "clip-score": Port(
        "transformers CLIPModel",
        ("torch", "transformers"),
        make_clip_towers,
        compare_clip_towers,
    ),
    "gemma": Port(
        "transformers Gemma3TextModel",
        ("torch", "transformers", "mlx_lm"),
        make_gemma,
        compare_gemma,
    ),
    "qwen-image-vae": Port(
        "diffusers AutoencoderKLQwenImage",
        ("torch", "diffusers"),
        make_qwen_image_vae,
        compare_qwen_image_vae,
    ),
    "kl-vae": Port("diffusers AutoencoderKL", ("torch", "diffusers"), make_kl_vae, compare_kl_vae),
    "flux2-vae": Port(
        "diffusers AutoencoderKLFlux2", ("torch", "diffusers"), make_flux2_vae, compare_flux2_vae
    ),
    "dc-ae": Port("diffusers AutoencoderDC", ("torch", "diffusers"), make_dc_ae, compare_dc_ae),
    "qwen-image": Port(
        "diffusers QwenImageTransformer2DModel",
        ("torch", "diffusers"),
        make_qwen_image,
        compare_qwen_image,
    ),
    "z-image": Port(
        "diffusers ZImageTransformer2DModel", ("torch", "diffusers"), make_z_image, compare_z_image
    ),
    "flux2": Port(
        "diffusers Flux2Transformer2DModel", ("torch", "diffusers"), make_flux2, compare_flux2
    ),
    "minit2i": Port("convert.pytorch.minit2i", ("torch",), make_minit2i, compare_minit2i),
    "t5": Port("transformers T5EncoderModel", ("torch", "transformers"), make_t5, compare_t5),
    "minit2i-b": Port(
        "convert.pytorch.minit2i",
        ("torch", "transformers"),
        make_whole_minit2i,
        compare_minit2i_pictures,
        only_random=True,
    ),
    "flux2-klein": Port(
        "diffusers Flux2KleinPipeline",
        (*PIPELINES, "peft"),
        make_kleins,
        compare_klein_prompt,
        only_random=True,
    ),
    "z-image-prompt": Port(
        "diffusers ZImagePipeline",
        (*PIPELINES, "peft"),
        make_z_images,
        compare_z_image_prompt,
        only_random=True,
    ),
    "qwen-prompt": Port(
        "diffusers QwenImagePipeline",
        (*PIPELINES, "peft"),
        make_whole_qwen_image,
        compare_qwen_prompt,
        only_random=True,
    ),
    "z-image-img2img": Port(
        "diffusers ZImageImg2ImgPipeline",
        PIPELINES,
        make_z_images,
        compare_z_image_img2img,
        only_random=True,
    ),
    "z-image-inpaint": Port(
        "diffusers ZImageInpaintPipeline",
        PIPELINES,
        make_z_images,
        compare_z_image_inpaint,
        only_random=True,
    ),
    "qwen-img2img": Port(
        "diffusers QwenImageImg2ImgPipeline",
        PIPELINES,
        make_whole_qwen_image,
        compare_qwen_img2img,
        only_random=True,
    ),
    "qwen-inpaint": Port(
        "diffusers QwenImageInpaintPipeline",
        PIPELINES,
        make_whole_qwen_image,
        compare_qwen_inpaint,
        only_random=True,
    ),
    "klein-edit": Port(
        "diffusers Flux2KleinPipeline",
        PIPELINES,
        make_kleins,
        compare_klein_edit,
        only_random=True,
    ),
    "klein-inpaint": Port(
        "diffusers Flux2KleinInpaintPipeline",
        PIPELINES,
        make_kleins,
        compare_klein_inpaint,
        only_random=True,
    ),
    "lora": Port(
        "diffusers load_lora_adapter",
        ("torch", "diffusers", "peft"),
        make_lora,
        compare_lora,
        only_random=True,
    ),
}
"""By kind, as `convert.from_torch` finds it."""


def measure(kind: str, folder: Path | None = None) -> list[tuple[str, float]]:
    """(output, relative difference) of one network; on random weights without a folder.

    Raises:
        UserError: a library is missing, or the folder holds another network.
    """
    port = PORTS[kind]
    require("parity", *port.packages)
    with tempfile.TemporaryDirectory() as place:
        if folder is None:
            folder = Path(place)
            port.make(folder)
        pairs = list(port.compare(folder))
    return [(what, relative_difference(found, expected)) for what, found, expected in pairs]


def kind_of(source: str) -> tuple[str, Path]:
    """Kind and folder of a checkpoint; `UserError` if no library has its network."""
    found = find_source(source, spool=spooled)
    with tempfile.TemporaryDirectory() as place:
        kind = find_kind(found, found.weights(Path(place)))
    if kind not in PORTS or PORTS[kind].only_random:
        raise UserError(f"{source} is a {kind}, which no library here can run by itself")
    return kind, found.folder


def _hush() -> None:
    """Hide transformers' progress bars, and its list of a checkpoint's unused keys."""
    # Without torch transformers would print that it is missing.
    if all(importlib.util.find_spec(name) is not None for name in ("transformers", "torch")):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def main() -> int:
    parser = Parser(prog="python -m convert.parity", description=__doc__)
    parser.add_argument(
        "--source",
        action="append",
        metavar="FOLDER",
        help="folder of a checkpoint to compare with; repeat for more (default: random weights)",
    )
    parser.add_argument(
        "--kind",
        action="append",
        choices=PORTS,
        help="network to compare; repeat for more (default: all)",
    )
    args = parser.parse_args()
    if args.source and args.kind:
        raise UserError("the kind of a --source is detected: leave --kind out")
    runs = [kind_of(source) for source in args.source or ()]
    runs = runs or [(kind, None) for kind in args.kind or PORTS]
    with announce("loading the original libraries ..."):
        _hush()
    print(f"{'network':<16}{'weights':<20}{'original':<38}{'output':<10}difference")
    worst = done = 0.0
    for kind, folder in runs:
        try:
            with announce(f"{kind}: computing with both libraries ..."):
                rows = measure(kind, folder)
        except UserError as error:
            if args.source or args.kind:
                raise
            print(f"{kind:<16}skipped: {error}", flush=True)
            continue
        for what, difference in rows:
            name = "random" if folder is None else folder.name[-18:]
            print(
                f"{kind:<16}{name:<20}{PORTS[kind].original:<38}{what:<10}{difference:.1e}",
                flush=True,
            )
            worst, done = max(worst, difference), done + 1
            if not difference <= LIMIT:
                worst = float("inf")
    if not done:
        raise UserError('no original library is installed: pip install "mlx_snapgen[parity]"')
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    run_command(main)
