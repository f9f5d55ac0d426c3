"""Warnings about parts of a prompt that the picture may not show."""

import difflib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_snapgen.errors import one_line
from mlx_snapgen.networks.text_encoders.base import normalize
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.vocabulary import (
    ALL_NUMBERS,
    RELATIONS,
    SIZES,
    nouns,
    numbers,
    pluralize,
    replacements,
    translate,
    with_article,
)


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


FUNCTION_WORDS = _set(
    """a an the this that its it and with also plus as well both another other each same together
    just exactly of is are there here group set them picture image sticker emoji icon drawing
    cartoon illustration photo clip art style simple plain draw show make create want like see
    please can would you me i to next beside side by on in at against front background color
    colored coloured than"""
)
"""Words of captions that do not change what a picture shows."""
POSITIONS = _set("left right above over below under underneath top bottom higher up")
OTHER_RELATIONS = _set(
    """wearing holding riding eating driving carrying chasing watching drinking playing sitting
    standing lying flying jumping running sleeping swimming hugging kissing pulling pushing inside
    outside behind between around among across through into onto towards toward along within
    surrounded covered hidden made from off"""
)
NEGATIONS = _set("no not without never except none nothing neither nor minus isn't")
QUANTITIES = _set("some many several few lots plenty numerous multiple dozens lot")

STOPS = frozenset(",.;:&!?")
MOST_THINGS = 2
"""Different things in one picture that the model draws well."""
MOST_LISTED = 5
"""Words in a note."""

MOST_SHOWN = 200
"""Characters of a prompt that are quoted."""


def words_of_captions(vocabulary: Mapping[str, Any]) -> frozenset[str]:
    """All words that mean something in a prompt, but no thing."""
    parts = FUNCTION_WORDS | POSITIONS | OTHER_RELATIONS | NEGATIONS | QUANTITIES
    named = [*vocabulary.get("colours", ()), *vocabulary.get("backgrounds", ())]
    return parts.union(ALL_NUMBERS, SIZES, ("gray", "colour"), *(map(str.split, named)))


class PromptWarning(UserWarning):
    """The picture may not show everything that the prompt names.

    Args:
        problem: what the picture may not show.
        prompt: named in the message, so that Python also prints it for the next prompt.
    """

    def __init__(self, problem: str, prompt: str):
        super().__init__(f'"{one_line(prompt, 60)}": {problem}')
        self.problem = problem


def understood(
    prompt: str, vocabulary: Mapping[str, Any] | None, *, lora_words: Sequence[str] | None = ()
) -> str:
    """`translate`d, and without unknown words in front of a thing, for which a model would draw
    something else; arguments as there.

    >>> understood("an angry little frog", {"nouns": ["frog"]})
    'a little frog'
    """
    text = translate(prompt, vocabulary, lora_words=lora_words)
    # A LoRA may be trained on words that are not recorded.
    if not _is_limited(vocabulary, lora_words) or lora_words:
        return text
    assert vocabulary is not None
    plain = normalize(text)
    spans = _Parser(vocabulary, ()).unknown_adjectives(plain)
    for start, end in reversed(spans):
        plain = plain[:start] + plain[end:].lstrip(" ,")
    return re.sub(r"\ban?\s+(\w+)", lambda a: with_article(a[1]), plain) if spans else text


def _is_limited(vocabulary: Mapping[str, Any] | None, lora_words: Sequence[str] | None) -> bool:
    """Whether the words that a model understands are known."""
    return bool(vocabulary and vocabulary.get("nouns")) and lora_words is not None


def check_prompts(
    settings: DrawSettings,
    tokenizers: Sequence[Any],
    *,
    vocabulary: Mapping[str, Any] | None,
    lora_words: Sequence[str] | None = (),
) -> Iterator[str]:
    """A line for each problem with the prompts.

    Args:
        settings: resolved.
        tokenizers: one per text encoder; None is not checked.
        vocabulary: the words that the model was trained on, by category; None: no limit.
        lora_words: more words, of the LoRAs in use; None: a LoRA may have been trained on any.
    """
    if settings.guidance_scale == 1 and settings.negative_prompt.strip():
        yield "the negative prompt has no effect at a guidance scale of 1"
    limited = _is_limited(vocabulary, lora_words)
    for what, text in (("prompt", settings.prompt), ("negative prompt", settings.negative_prompt)):
        text, meaningless = translate(text, vocabulary, lora_words=lora_words), ""
        for tokenizer in filter(None, tokenizers):
            if cut := tokenizer.cut(text):
                yield too_long(what, cut, max_length=tokenizer.max_length)
            if unknown := tokenizer.unknown(text):
                meaningless = " ".join(unknown)
                # The joiner and the selectors of emoji are invisible.
                shown = one_line(re.sub("[\u200d\ufe0e\ufe0f]", "", meaningless), MOST_SHOWN)
                yield f"the {what} has parts that mean nothing here: {shown}"
        if vocabulary and limited and (what == "prompt" or settings.guidance_scale != 1):
            parsed = _Parser(vocabulary, lora_words or ()).parse(normalize(text))
            strange = (word for word in parsed.unknowns if word not in normalize(meaningless))
            listed = _listed(list(dict.fromkeys(strange)), parsed.known)
            if what == "prompt" and text.strip() and not parsed.things and not parsed.of_lora:
                such = ", ".join(vocabulary["nouns"][:5])
                yield f"the prompt names nothing that this model can draw (such as {such})" + (
                    f"; not understood: {listed}; --vocabulary lists all words" if listed else ""
                )
                continue
            if listed:
                yield f"not understood: {listed}; --vocabulary lists all words"
            if what == "prompt":
                yield from _misunderstood(parsed, vocabulary)


def too_long(what: str, cut: str, *, max_length: int) -> str:
    """The line about a prompt whose end is ignored.

    Args:
        what: "prompt" or "negative prompt".
        cut: that end.
    """
    return f"the {what} is longer than {max_length} tokens, cut: '{one_line(cut, MOST_SHOWN)}'"


def _listed(words: Sequence[str], known: Sequence[str]) -> str:
    """Unknown words with the nearest known ones, for a note."""
    shown = []
    for word in words[:MOST_LISTED]:
        match = _nearest(word[:40], known)
        shown.append(f"{one_line(word, 40)}" + (f" (did you mean {match}?)" if match else ""))
    return ", ".join(shown) + (" ..." if words[MOST_LISTED:] else "")


def _nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that a misspelled one may be: also "bleu" is, "hat" and "bowl" are not."""
    alike = [one for one in known if one[:1] == word[:1]]
    swapped = [one for one in alike if sorted(one) == sorted(word)]
    return next(iter(swapped or difflib.get_close_matches(word, alike, n=1, cutoff=0.77)), None)


@dataclass
class _Thing:
    """A thing of a prompt, with the words about it."""

    word: str
    noun: str | None
    plural: bool
    number: int | None = None
    quantity: str = ""
    """The word for its number."""
    colors: list[str] = field(default_factory=list)
    negated: bool = False


@dataclass
class _Parsed:
    """The parts of a prompt."""

    known: list[str]
    """All words that the prompt could have had."""
    things: list[_Thing] = field(default_factory=list)
    backgrounds: list[str] = field(default_factory=list)
    unknowns: list[str] = field(default_factory=list)
    negations: list[str] = field(default_factory=list)
    relations: list[str] = field(default_factory=list)
    """Those that the model does not draw."""
    positions: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    of_lora: bool = False
    """Whether it has a word of a LoRA, which may be a thing, a color or a style."""


def _joined(text: str, start: int, end: int) -> tuple[int, int]:
    """A part of a normalized text, and what is joined to it by hyphens or the like."""
    left = max(text.rfind(gap, 0, start) for gap in " ,") + 1
    ends = [place for gap in " ," if (place := text.find(gap, end)) >= 0]
    return left, min(ends, default=len(text))


class _Parser:
    """Reads the simple English of captions: things with numbers, colors and positions."""

    def __init__(self, vocabulary: Mapping[str, Any], lora_words: Sequence[str]):
        self.vocabulary = vocabulary
        self.nouns = {normalize(word): noun for word, noun in nouns(vocabulary).items()}
        colors = (*vocabulary.get("colours", ()), *vocabulary.get("backgrounds", ()))
        self.colors = {
            normalize(word) for word in (*colors, *(["gray"] if "grey" in colors else ()))
        }
        words = {normalize(word) for word in lora_words}
        self.lora_words = words | {pluralize(word) for word in words}
        self.longest = max(word.count(" ") + 1 for word in (*self.nouns, *self.colors))

    def parse(self, text: str) -> _Parsed:
        """The parts of a normalized text."""
        wrong = self.vocabulary.get("misspelled", ())
        hints = (
            *(n for n in self.nouns if n not in wrong),
            *(
                w
                for w, noun in replacements(self.vocabulary).items()
                if normalize(noun) in self.nouns
            ),
            *self.colors,
            *self.lora_words,
            *POSITIONS,
            *numbers(self.vocabulary),
        )
        parsed = _Parsed([*hints, "next", "beside", "background", "color", "with", "and"])
        tags = list(self._tags(self._words(text)))
        colors: list[str] = []
        number, quantity, previous, before = None, "", "", ""
        for k, (kind, word) in enumerate(tags):
            after = tags[k + 1] if k + 1 < len(tags) else ("end", "")
            if kind == "color":
                colors.append(word)
                continue
            if kind == "noun":
                negated = before == "negation"
                thing = _Thing(word, *self.nouns[word], number, quantity, colors, negated)
                parsed.things.append(thing)
                colors, number, quantity, before = [], None, "", ""
                if previous in ("in", "on", "at", "front", "against"):
                    parsed.relations.append("in front of" if previous == "front" else previous)
                    previous = ""
                continue
            before = kind if kind != "size" else before
            # "red and blue car", "red big car", "red-colored car"
            between = word == "and" and tags[k - 1][0] == after[0] == "color"
            joins = between or kind == "size"
            if colors and not joins and word not in ("colored", "coloured", "color"):
                if word == "background" or (previous == "on" and kind != "unknown"):
                    parsed.backgrounds.append(" and ".join(colors))
                elif kind not in ("unknown", "lora") and parsed.things:
                    # "an apple that is red"
                    parsed.things[-1].colors += colors
                colors, previous = [], ""
            if kind == "number":
                number, quantity = _number(word), word
            elif number is not None and word == "them" and parsed.things:
                parsed.things[-1].number, parsed.things[-1].quantity = number, quantity
                number, quantity = None, ""
            elif kind in ("unknown", "negation", "relation", "position", "size"):
                getattr(parsed, kind + "s").append(word)
            if kind in ("unknown", "lora"):
                number, quantity = None, ""
            parsed.of_lora |= kind == "lora"
            if kind in ("unknown", "lora", "stop", "position", "negation", "relation"):
                previous = ""
            elif word in ("in", "on", "at", "front", "against"):
                previous = word
            elif word in ("of", "and", "with", "background", "is", "are", "side"):
                previous = previous if word == "of" else ""
        return parsed

    def unknown_adjectives(self, text: str) -> list[tuple[int, int]]:
        """Where in a normalized text unknown words are (start, end), with what is joined to them,
        between which and a thing are only sizes, colors and more of them."""
        found: list[tuple[int, int]] = []
        before: list[tuple[int, int]] = []
        end = 0
        text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        for kind, phrase in self._tags(self._words(text)):
            for word in phrase.split():
                start = text.find(word, end)
                end = start + len(word)
            if kind == "unknown":
                before.append(_joined(text, start, end))
            elif kind == "noun":
                first = text.rfind(phrase.split()[0], 0, end)
                found += [span for span in before if span[1] <= first]
            if kind not in ("unknown", "size", "color") and phrase != ",":
                before = []
        return sorted({*found})

    def _words(self, text: str) -> list[str]:
        text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        words = re.findall(r"[^\W_]+(?:['-]+[^\W_]+)*|[^\w\s]", text)
        words = [
            w for w in words if w[0].isalnum() or w in STOPS or unicodedata.category(w) == "So"
        ]
        whole = {part for word in (*self.nouns, *self.lora_words) for part in word.split()}
        whole |= FUNCTION_WORDS | NEGATIONS
        return [
            part
            for word in words
            for part in ([word] if word in whole or word.endswith("n't") else word.split("-"))
        ]

    def _tags(self, words: list[str]) -> Iterator[tuple[str, str]]:
        """(kind, words) of the longest known phrases in turn, and ("stop", "") at the end."""
        start = 0
        while start < len(words):
            for end in range(min(len(words), start + self.longest), start, -1):
                phrase = " ".join(words[start:end])
                following = words[end] if end < len(words) else ""
                before = " ".join(words[max(0, start - 2) : start])
                if kind := self._kind(phrase, before=before, following=following):
                    yield kind, phrase
                    start = end
                    break
            else:
                yield "unknown", words[start]
                start += 1
        yield "stop", ""

    def _kind(self, phrase: str, *, before: str, following: str) -> str:
        """The kind of a phrase; "" for an unknown one."""
        if phrase in self.colors:
            # "an orange cat" and "in orange", but "an orange and a lemon"
            linked = before.endswith((" in", " is", " are", "colored", "coloured", " on"))
            is_color = (
                phrase not in self.nouns
                or following in ("background", "colored", "coloured", "color", "plain", *SIZES)
                or (linked and before != "there is")
                or any(f"{name} ".startswith(f"{following} ") for name in self.nouns)
            )
            return "color" if is_color else "noun"
        if phrase in self.nouns:
            return "noun"
        if phrase.isdecimal() or phrase in ALL_NUMBERS or phrase in QUANTITIES:
            return "number"
        if phrase in STOPS:
            return "stop"
        for kind, words in (
            ("size", SIZES),
            ("position", POSITIONS),
            ("function", FUNCTION_WORDS),
            ("lora", self.lora_words),
            ("negation", NEGATIONS),
            ("relation", OTHER_RELATIONS),
        ):
            if phrase in words or (
                kind == "negation" and phrase.endswith("n't") and " " not in phrase
            ):
                return kind
        return ""


def _number(word: str) -> int:
    """The number that a word or digits name; 0 for an uncertain one, such as "some"."""
    if word.isdecimal():
        return int(word[:6])
    return ALL_NUMBERS.get(word, 0)


def _misunderstood(parsed: _Parsed, vocabulary: Mapping[str, Any]) -> Iterator[str]:
    """Lines about known words that the model does not understand together."""
    if parsed.negations:
        yield f"'{parsed.negations[0]}' has no effect: the picture may show what follows it"
    if parsed.relations:
        known = ", ".join(RELATIONS)
        yield f"'{parsed.relations[0]}' is not understood: the relations are {known}"
    poor = vocabulary.get("drawn_badly", ())
    if sizes := [word for word in parsed.sizes if word in poor]:
        yield f"this model draws things badly with '{sizes[0]}': leave it out"
    if parsed.of_lora:
        return
    yield from _miscounted(parsed, vocabulary)
    yield from _miscolored(parsed, vocabulary)
    if parsed.positions and not parsed.unknowns and len(parsed.things) == 1:
        yield f"'{parsed.positions[0]}' needs two things, such as a cat above a dog"


def _miscounted(parsed: _Parsed, vocabulary: Mapping[str, Any]) -> Iterator[str]:
    most = numbers(vocabulary)[-1]
    limit = len(numbers(vocabulary))
    for thing in parsed.things:
        number, quantity = thing.number, thing.quantity
        if (number or 0) > limit or quantity in ("0", "zero"):
            yield f"'{quantity} {thing.word}' is not understood: this model counts to {most}"
            return
        if number == 0 or (number is None and thing.plural and not thing.negated):
            yield f"'{quantity or thing.word}' is not understood: give a number up to {most}"
            return
    kinds = {thing.noun or thing.word: thing.word for thing in parsed.things}
    counted = [thing for thing in parsed.things if (thing.number or 1) > 1]
    if len(kinds) > MOST_THINGS:
        listed = ", ".join(list(kinds.values())[:MOST_LISTED])
        yield f"{len(kinds)} different things are too many for this model: {listed}"
    elif len(kinds) > 1 and counted:
        phrase = f"{counted[0].quantity} {counted[0].word}"
        yield f"'{phrase}' beside another thing: this model counts one kind of thing well"
    elif (total := sum(thing.number or 1 for thing in parsed.things)) > limit:
        yield f"{total} things are too many: this model counts to {most}"


def _miscolored(parsed: _Parsed, vocabulary: Mapping[str, Any]) -> Iterator[str]:
    colors = [normalize(color) for color in vocabulary.get("colours", ())]
    colors += ["gray"] * ("grey" in colors)
    able, own = vocabulary.get("recolourable"), vocabulary.get("own_colours", {})
    for thing in parsed.things:
        if not thing.colors:
            continue
        phrase = f"{' and '.join(thing.colors)} {thing.word}"
        if others := [color for color in thing.colors if color not in colors]:
            yield f"'{others[0]}' is understood as a background only, not in '{phrase}'"
        elif len(set(thing.colors)) > 1:
            yield f"'{phrase}' is not understood: each thing has one color"
        elif thing.noun is None or able is None or own.get(thing.noun) == thing.colors[0]:
            continue
        elif thing.noun not in able:
            many = thing.word if thing.plural else pluralize(thing.word)
            yield f"'{phrase}' is not understood: this model cannot color {many}"
    backgrounds = [normalize(name) for name in vocabulary.get("backgrounds", ())]
    for name in parsed.backgrounds:
        if backgrounds and name not in backgrounds and name != "gray":
            yield f"'{name}' is not understood as a background"
    if len(parsed.backgrounds) > 1:
        yield "a picture has one background"
