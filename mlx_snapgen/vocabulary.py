"""The words that a model understands (vocabulary.json), and prompts in these words."""

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

REGULAR = ("human", "talisman", "caiman", "shaman", "ottoman", "mongoose")
"""Endings whose plural is regular, although they look like those of `IRREGULAR`."""
UNCHANGED = ("sheep", "fish", "deer", "squid", "shrimp", "thumbs up")
IRREGULAR = {
    **{"mouse": "mice", "cactus": "cacti", "man": "men", "leaf": "leaves", "loaf": "loaves"},
    **{"wolf": "wolves", "knife": "knives", "scarf": "scarves", "tooth": "teeth"},
    **{"goose": "geese", "child": "children", "foot": "feet", "shelf": "shelves", "elf": "elves"},
    **{"quiz": "quizzes", "half": "halves", "calf": "calves"},
    **{"tomato": "tomatoes", "potato": "potatoes", "mango": "mangoes", "volcano": "volcanoes"},
}
"""Endings whose plural `pluralize` does not derive."""

NUMBERS = ("one", "two", "three", "four")
"""The counts that models without the category "numbers" are trained on."""
RELATIONS = ("to the left of", "to the right of", "above", "below", "next to")
ALL_NUMBERS = {
    **{"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7},
    **{"eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "twenty": 20, "single": 1},
    **{"couple": 2, "dozen": 12, "hundred": 100, "thousand": 1000},
}
ARTICLES = ("a", "an", "the", "another", "same")
SIZES = ("small", "little", "tiny", "big", "large", "huge")
OTHER_SIZES = ("giant", "gigantic", "enormous", "mini")
"""Those that a model may have only as "replaced"."""
VARIATION = "\N{VARIATION SELECTOR-16}"
"""Follows a character that is shown as an emoji."""


def pluralize(phrase: str) -> str:
    """Regular plural of a noun phrase; the head is what precedes " of " or " with ".

    >>> pluralize("slice of pizza"), pluralize("puppy"), pluralize("fox")
    ('slices of pizza', 'puppies', 'foxes')
    """
    for link in (" of ", " with "):
        head, found, rest = phrase.partition(link)
        if found:
            return pluralize(head) + link + rest
    if phrase.endswith(UNCHANGED):
        return phrase
    for ending, plural in IRREGULAR.items():
        if phrase.endswith(ending) and not phrase.endswith(REGULAR):
            return phrase.removesuffix(ending) + plural
    if phrase.endswith("y") and phrase[-2:-1] not in [*"aeiou", ""]:
        return phrase[:-1] + "ies"
    return phrase + ("es" if phrase.endswith(("s", "x", "z", "ch", "sh")) else "s")


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an", by its sound: "an apple", "a unicorn", "an hourglass"."""
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "ufo", "uk", "use", "eu"))
    return ("an " if vowel or phrase.startswith(("hour", "heir")) else "a ") + phrase


def numbers(vocabulary: Mapping[str, Any]) -> list[str]:
    """The counts that the model was trained on, from "one"."""
    return list(vocabulary.get("numbers") or NUMBERS)


class Word(NamedTuple):
    """A word for a thing."""

    noun: str | None
    """The noun that it means; None where the vocabulary does not name it."""
    plural: bool


def nouns(vocabulary: Mapping[str, Any]) -> dict[str, Word]:
    """All words for things: nouns, synonyms, and plurals of both.

    The category "other_words" is an object of synonyms, plurals, and their nouns; in older models a
    list, without the plurals of synonyms.
    """
    names: list[str] = vocabulary.get("nouns", [])
    others = vocabulary.get("other_words", [])
    meanings: dict[str, str | None] = dict(others) if isinstance(others, dict) else {}
    meanings = dict.fromkeys(others) | meanings | dict(zip(names, names, strict=True))
    plurals = {pluralize(word): word for word in meanings if pluralize(word) != word}
    wrong = vocabulary.get("misspelled", ())  # plurals that older models were trained on
    found = {word: Word(noun, word in plurals or word in wrong) for word, noun in meanings.items()}
    if not isinstance(others, dict):
        for plural, word in plurals.items():
            if word not in plurals:
                found[plural] = Word(meanings[word], True)
    return found


def with_thing(vocabulary: Mapping[str, Any], name: str, plural: str) -> dict[str, Any]:
    """A vocabulary with one more noun."""
    others = vocabulary.get("other_words", [])
    others = others | {plural: name} if isinstance(others, dict) else [*others, plural]
    return {**vocabulary, "nouns": [*vocabulary.get("nouns", []), name], "other_words": others}


def replacements(vocabulary: Mapping[str, Any]) -> dict[str, str]:
    """The category "replaced", words -> words that the model was trained on, and plurals of it."""
    known, given = nouns(vocabulary), vocabulary.get("replaced", {})
    found = {
        pluralize(word): pluralize(meaning)
        for word, meaning in given.items()
        if meaning in known and not known[meaning].plural
    }
    return {word: meaning for word, meaning in (found | given).items() if word not in known}


def listed(vocabulary: Mapping[str, Any]) -> dict[str, list[str]]:
    """Everything that the model understands, as lists with titles."""
    names: list[str] = vocabulary.get("nouns", [])
    wrong = vocabulary.get("misspelled", [])
    words = nouns(vocabulary)
    others = {
        word: f" ({meaning})" if meaning and word != pluralize(meaning) else ""
        for word, (meaning, _) in words.items()
        if word not in (*names, *wrong)
    }
    own = vocabulary.get("own_colours", {})
    replaced = {word: to for word, to in vocabulary.get("replaced", {}).items() if to not in wrong}
    others |= {word: "" for word in vocabulary.get("replaced", {}) if word not in replaced}
    lists = {
        "nouns": names,
        "other words for them": [f"{word}{meaning}" for word, meaning in sorted(others.items())],
        "colors": vocabulary.get("colours", []),
        "nouns that take a color": vocabulary.get("recolourable", []),
        "nouns with a color of their own": [f"{color} {noun}" for noun, color in own.items()],
        "backgrounds": vocabulary.get("backgrounds", []),
        "numbers": numbers(vocabulary),
        "relations": list(RELATIONS),
        "sizes": [word for word in SIZES if word not in vocabulary.get("drawn_badly", ())],
        "emoji": list(vocabulary.get("emoji", {})),
        "words with the same meaning": [f"{word} ({to})" for word, to in replaced.items()],
        "without a meaning, at the end": vocabulary.get("ignored", []),
        "drawn badly": vocabulary.get("drawn_badly", []),
    }
    return {title: words for title, words in lists.items() if words}


def translate(
    prompt: str, vocabulary: Mapping[str, Any] | None, *, lora_words: Sequence[str] | None = ()
) -> str:
    """`prompt` in the words that the model was trained on; unchanged where it has no other words.

    Args:
        lora_words: words of the LoRAs in use, which stay; None: any word may be one.

    >>> translate("two doggies", {"nouns": ["dog"], "replaced": {"doggies": "dogs"}})
    'two dogs'
    >>> translate("🐱🐱 on blue", {"nouns": ["cat"], "emoji": {"🐱": "cat"}})
    'two cats on blue'
    """
    vocabulary = vocabulary or {}
    replaced, emoji = replacements(vocabulary), vocabulary.get("emoji", {})
    if (not replaced and not emoji) or lora_words is None:
        return prompt
    if lora_words:
        # The short words of a LoRA's captions are not recorded.
        known = {*lora_words}
        replaced = {
            word: meaning
            for word, meaning in replaced.items()
            if not all(len(part) < 3 or part in known for part in word.split())
        }
    if ignored := vocabulary.get("ignored"):
        prompt = _end_pattern(tuple(ignored)).sub("", prompt)
    if emoji:
        one, run = _emoji_patterns(tuple(emoji))
        colors = vocabulary.get("colours", [])
        prompt = run.sub(lambda r: _spelled(r, one, emoji=emoji, colors=colors), prompt)
    # Phrases such as "pair of scissors" are found first, and stay.
    kept = [word for word in nouns(vocabulary) if not word.isalpha()]
    return _word_pattern((*replaced, *kept)).sub(
        lambda found: replaced.get(" ".join(found[0].lower().split()), found[0]), prompt
    )


@functools.lru_cache(maxsize=8)
def _word_pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    longest = sorted(words, key=len, reverse=True)
    texts = (r"\s+".join(map(re.escape, word.split())) for word in longest)
    return re.compile(rf"(?<!\w)(?:{'|'.join(texts)})(?!\w)", re.IGNORECASE)


@functools.lru_cache(maxsize=8)
def _end_pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """Some of the words at the end of a prompt, but not all of it."""
    texts = (r"\s+".join(map(re.escape, word.split())) for word in words)
    return re.compile(rf"(?<=\w)(?:[\s,.!]+(?:{'|'.join(texts)}))+[\s.!?]*$", re.IGNORECASE)


@functools.lru_cache(maxsize=8)
def _emoji_patterns(emoji: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """One emoji, and a run of them."""
    symbols = "|".join(map(re.escape, sorted(emoji, key=len, reverse=True)))
    one = f"({symbols}){VARIATION}?"
    return re.compile(one), re.compile(rf"{one}(?:\s*{one})*")


def _spelled(
    run: re.Match[str], one: re.Pattern[str], *, emoji: Mapping[str, str], colors: list[str]
) -> str:
    """A run of emoji in words: "a cat and two dogs"; bare after such as "a", "red" or "big"."""
    names = [emoji[symbol[1]] for symbol in one.finditer(run[0])]
    groups = [(name, len(list(some))) for name, some in itertools.groupby(names)]
    last = re.search(r"([^\W_]+)\s*$", run.string[: run.start()])
    before = last[1].lower() if last else ""
    phrases = [
        with_article(name) if count == 1 else f"{_number_word(count)} {pluralize(name)}"
        for name, count in groups
    ]
    number = int(before) if before.isdecimal() else ALL_NUMBERS.get(before)
    name, count = groups[0]
    if count == 1 and (number or before in (*colors, *SIZES, *OTHER_SIZES, *ARTICLES)):
        phrases[0] = pluralize(name) if number and number > 1 else name
    words = " and ".join((", ".join(phrases[:-1]), phrases[-1]) if phrases[1:] else phrases)
    start = "" if run.start() == 0 or run.string[run.start() - 1].isspace() else " "
    after = run.string[run.end() : run.end() + 1]
    return start + words + (" " if after.isalnum() else "")


def _number_word(count: int) -> str:
    return next((word for word, number in ALL_NUMBERS.items() if number == count), str(count))
