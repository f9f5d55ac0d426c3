"""Warnings about parts of a prompt that have no effect on the picture."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_snapgen.networks.text_encoders.base import normalize
from mlx_snapgen.settings import DrawSettings


def check_prompts(
    settings: DrawSettings,
    tokenizers: Sequence[Any],
    *,
    vocabulary: Mapping[str, Sequence[str]] | None,
    lora_words: Sequence[str] | None = (),
) -> Iterator[str]:
    """A line for each problem with the prompts.

    Args:
        settings: resolved.
        tokenizers: one per text encoder; None is not checked.
        vocabulary: the words that the model was trained on, by category; None: no limit.
        lora_words: more words, of the LoRAs in use; None: a LoRA may have been trained on any.
    """
    prompt, negative_prompt = settings.prompt, settings.negative_prompt
    if settings.guidance_scale == 1 and negative_prompt.strip():
        yield "the negative prompt has no effect at a guidance scale of 1"
    for what, text in (("prompt", prompt), ("negative prompt", negative_prompt)):
        for tokenizer in filter(None, tokenizers):
            if cut := tokenizer.cut(text):
                yield f"the {what} is longer than {tokenizer.max_length} tokens, cut: '{cut}'"
            if unknown := tokenizer.unknown(text):
                yield f"the {what} has parts that mean nothing here: {' '.join(unknown)}"
    names = _names(vocabulary or {})
    known = [*names, *(normalize(word) for word in lora_words or ())]
    pattern = rf"\b({'|'.join(map(re.escape, known))})\b"
    if names and lora_words is not None and not re.search(pattern, normalize(prompt)):
        nouns = ", ".join(names[:5])
        yield f"the prompt names nothing that this model can draw (such as {nouns})"


def _names(vocabulary: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of things that a model can draw: its nouns, their plurals and synonyms."""
    words = (vocabulary.get(category, []) for category in ("nouns", "other_words"))
    return [normalize(word) for some in words for word in some]
