"""A model with other sizes as the start of an untrained one."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.networks.layers import flat_parameters
from train.data.text import is_trained

TOKENS = "token_embedding.weight"


def take_weights(model: Components, source: Components) -> tuple[int, int]:
    """Copy the weights of `source` whose names and shapes agree into the parts that are trained.

    An embedding is copied for each sentencepiece token that both text encoders have.

    Returns:
        number of weights copied, and of all in these parts.
    """
    parts = [(model.transformer, flat_parameters(source.transformer))]
    theirs = [e for e in source.text_encoders if is_trained(e.config)]
    for ours in (e for e in model.text_encoders if is_trained(e.config)):
        if theirs:
            parts.append((ours, _encoder_weights(ours, theirs.pop(0))))
    taken = total = 0
    for module, found in parts:
        own = flat_parameters(module)
        fitting = {k: v for k, v in found.items() if k in own and v.shape == own[k].shape}
        module.update(tree_unflatten([(k, v.astype(own[k].dtype)) for k, v in fitting.items()]))
        taken += sum(v.size for v in fitting.values())
        total += sum(v.size for v in own.values())
    return taken, total


def _encoder_weights(ours: Any, theirs: Any) -> dict[str, mx.array]:
    """The weights of the text encoder `theirs`, its embeddings in the order of our tokens."""
    found, table = flat_parameters(theirs), ours.token_embedding.weight
    if found[TOKENS].shape[1] == table.shape[1]:
        known = {piece: k for k, piece in enumerate(theirs.tokenizer.pieces())}
        rows = [(k, known[p]) for k, p in enumerate(ours.tokenizer.pieces()) if p in known]
        to, of = (mx.array(numbers) for numbers in zip(*rows, strict=True))
        found[TOKENS] = mx.array(table)
        found[TOKENS][to] = flat_parameters(theirs)[TOKENS][of].astype(table.dtype)
    return found
