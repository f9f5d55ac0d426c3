"""The pictures of a drawing's settings: to start from, to edit, and what to redraw."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_snapgen.fitting import fitted_mask, fitted_picture, fitted_reference
from mlx_snapgen.picture_files import picture_name
from mlx_snapgen.settings import DrawSettings


@dataclass(frozen=True)
class Inputs:
    """The pictures that a drawing starts from, read and fitted."""

    image: Image.Image | None = None
    """RGB or RGBA, in the size of the drawing."""
    redrawn: np.ndarray | None = None
    """Pixels to redraw (H, W); None: all."""
    references: tuple[Image.Image, ...] = ()
    """Pictures to edit, RGB."""
    notices: tuple[str, ...] = ()
    """What had to be changed in them."""

    def over(self, drawn: Image.Image) -> Image.Image:
        """A drawn picture with the pixels that were not to be redrawn as they were."""
        if self.image is None or self.redrawn is None:
            return drawn
        kept = np.asarray(self.image.convert(drawn.mode))
        return Image.fromarray(np.where(self.redrawn[:, :, None], np.asarray(drawn), kept))

    def latent_mask(self, factor: int) -> mx.array | None:
        """(1, H/f, W/f, 1): 1 where any of the f x f pixels is redrawn, else 0; None: all are."""
        if self.redrawn is None:
            return None
        height, width = (side // factor for side in self.redrawn.shape)
        cells = mx.array(self.redrawn).reshape(1, height, factor, width, factor, 1)
        return cells.any(axis=(2, 4)).astype(mx.float32)


def read_inputs(settings: DrawSettings, *, unit: int, keep_alpha: bool = False) -> Inputs:
    """The pictures of resolved settings.

    Args:
        unit: sides of pictures to edit are multiples of this.
        keep_alpha: the picture to start from keeps its alpha channel.

    Raises:
        UserError: a file is missing, damaged or not a picture, or the mask selects nothing.
    """
    assert settings.height is not None and settings.width is not None
    size = settings.height, settings.width
    fitted = [(source, fitted_reference(source, unit=unit)) for source in settings.edit]
    if settings.image is not None:
        first = fitted_picture(settings.image, size, how=settings.fit, keep_alpha=keep_alpha)
        fitted.insert(0, (settings.image, first))
    notices = [
        f"{picture_name(source) or 'the picture'}: {', '.join(changes)}"
        for source, (_, changes) in fitted
        if changes
    ]
    redrawn = None
    if settings.mask is not None:
        redrawn = fitted_mask(settings.mask, size, how=settings.fit)
    pictures = [picture for _, (picture, _) in fitted]
    image = pictures.pop(0) if settings.image is not None else None
    return Inputs(image, redrawn, references=tuple(pictures), notices=tuple(notices))
