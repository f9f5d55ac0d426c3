"""The kinds of autoencoders by name.

A public autoencoder has a module beside this one, an entry in `AUTOENCODERS`, a table of its
weights in public/keys/autoencoders.py, and an entry in `KINDS` of public/kinds.py.
"""

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.convolutional import ConvolutionalAutoencoder
from mlx_snapgen.networks.autoencoders.dc_ae import DCAutoencoder
from mlx_snapgen.networks.autoencoders.flux2 import Flux2Autoencoder
from mlx_snapgen.networks.autoencoders.kl import KLAutoencoder
from mlx_snapgen.networks.autoencoders.pixels import PixelAutoencoder
from mlx_snapgen.networks.autoencoders.qwen_image import QwenAutoencoder
from mlx_snapgen.networks.autoencoders.taehv import TinyAutoencoder

AUTOENCODERS = {
    "convolutional": ConvolutionalAutoencoder,
    "qwen-image": QwenAutoencoder,
    "taehv": TinyAutoencoder,
    "kl": KLAutoencoder,
    "flux2": Flux2Autoencoder,
    "dc-ae": DCAutoencoder,
    "pixels": PixelAutoencoder,
}
"""`AutoencoderConfig.kind` -> the class."""


def make_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """An autoencoder of the config's kind with random weights; `UserError`: no such kind."""
    if config.kind not in AUTOENCODERS:
        known = ", ".join(AUTOENCODERS)
        raise UserError(f"unknown autoencoder kind '{config.kind}', known: {known}")
    return AUTOENCODERS[config.kind](config)
