"""What a model understands of a prompt, and what a note tells."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest

from mlx_snapgen.checkpoint.config import ModelFolder, load_vocabulary
from mlx_snapgen.cli.notices import short_warnings
from mlx_snapgen.generate import main
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.prompt_check import PromptWarning, check_prompts, understood
from mlx_snapgen.settings import DrawSettings, trained_size
from mlx_snapgen.vocabulary import listed, nouns, translate
from tests.tiny import MODEL
from train.data.stickers.vocabulary import FLUENT, NOTO, vocabulary_file

FOLDER = ModelFolder.open(None)
BUILT_IN = load_vocabulary(FOLDER.path)
assert BUILT_IN is not None
VOCABULARY = vocabulary_file(100, NOTO)
VOCABULARY["drawn_badly"] = ["small", "little", "tiny", "big", "large", "huge"]
"""Of a model that counts to four, and draws things badly with a word for a size."""
OLD_NAMES = ("nouns", "other_words", "colours", "recolourable", "backgrounds")
OLD = {name: list(VOCABULARY[name]) for name in OLD_NAMES}
"""As older models have it."""


def notes(prompt, vocabulary=VOCABULARY, **more):
    settings = DrawSettings(prompt, guidance_scale=1.0)
    return list(check_prompts(settings, [None], vocabulary=vocabulary, **more))


def strange(words):
    return f"not understood: {words}; --vocabulary lists all words"


def nothing(words):
    such = "such as apple, banana, car, cat, dog"
    return f"the prompt names nothing that this model can draw ({such}); " + strange(words)


def relation(word):
    known = "to the left of, to the right of, above, below, next to"
    return f"'{word}' is not understood: the relations are {known}"


def no_effect(word):
    return f"'{word}' has no effect: the picture may show what follows it"


def too_many(words):
    return f"'{words}' is not understood: this model counts to four"


def how_many(words):
    return f"'{words}' is not understood: give a number up to four"


def no_color(words, many):
    return f"'{words}' is not understood: this model cannot color {many}"


def badly(word):
    return f"this model draws things badly with '{word}': leave it out"


HALF_UNDERSTOOD = {
    "a bleu car": [strange("bleu (did you mean blue?)")],
    "a red aple and a lemon": [strange("aple (did you mean apple?)")],
    "a zebra": [nothing("zebra")],
    "a cat wearing a hat": [strange("hat"), relation("wearing")],
    "a dog inside a house": [relation("inside")],
    "a cat without a dog": [no_effect("without")],
    "no cats, just a dog": [no_effect("no")],
    "don't draw a cat, draw a dog": [no_effect("don't")],
    "five apples": [too_many("five apples")],
    "10 cats": [too_many("10 cats")],
    "a dozen eggs": [too_many("dozen eggs")],
    "zero cats and a dog": [too_many("zero cats")],
    "many stars": [how_many("many")],
    "some dogs": [how_many("some")],
    "lots of ducks": [how_many("lots")],
    "cats": [how_many("cats")],
    "a blue cat": [no_color("blue cat", "cats")],
    "three purple pandas": [no_color("purple pandas", "pandas")],
    "a red and blue car": ["'red and blue car' is not understood: each thing has one color"],
    "a grey mouse": ["'grey' is understood as a background only, not in 'grey mouse'"],
    "a light blue car": [
        "'light blue' is understood as a background only, not in 'light blue car'"
    ],
    "a cat on an orange background": ["'orange' is not understood as a background"],
    "a cat, a dog and a car": ["3 different things are too many for this model: cat, dog, car"],
    "a cat and a dog and a tree and a house": [
        "4 different things are too many for this model: cat, dog, tree, house"
    ],
    "three cats and two dogs": [
        "'three cats' beside another thing: this model counts one kind of thing well"
    ],
    "two cats to the left of a dog": [
        "'two cats' beside another thing: this model counts one kind of thing well"
    ],
    "a big cat": [badly("big")],
    "a tiny red car": [badly("tiny")],
    "a huge house and a small tree": [badly("huge")],
    "a cat in a box": [strange("box")],
    "a cat on a bed": [relation("on")],
    "an apple in front of a house": [relation("in front of")],
    "a dog behind a tree": [relation("behind")],
    "a fish in a cup of coffee": [relation("in")],
    "a cat on the left": ["'left' needs two things, such as a cat above a dog"],
    "a star at the top": ["'top' needs two things, such as a cat above a dog"],
    "a happy cat": [strange("happy")],
    "a shiny golden crown": [strange("shiny, golden")],
    "a realistic photo of a lion": [strange("realistic")],
    "a watercolor drawing of a rose": [nothing("watercolor, rose")],
    "a fat penguin riding a bicycle": [strange("fat"), relation("riding")],
    "a cat or a dog": [strange("or")],
    "🦊": [nothing("🦊")],
    "🐱 and 🦊": [strange("🦊")],
    "a dark green frog": [strange("dark")],
    "a cat on a red background and a dog on a blue background": ["a picture has one background"],
    "a monkey eating a banana": [relation("eating")],
    "a car made of cheese": [relation("made")],
    "half an apple": [strange("half")],
}

UNDERSTOOD = """
a red apple
An  APPLE
a red apple to the left of a blue car
three cats on a yellow background
a purple car
two owls
a cat and a dog
two tomatoes
🍎
🐶🐶 on a blue background
a blue 🚗
a red car and a green frog
a pair of scissors
a pair of dogs
red scissors and blue jeans
a house above a tree
a tree below a cloud
a drawing of a robot
Can you draw a butterfly, please?
could you make a cat for us?
a gray background, a penguin
a cat on a light blue background
a moon on black
an orange orange
an orange and a lemon
an orange car next to an orange
four mice
2 aeroplanes
an apple that is green
the crown is purple and the key is yellow
a loaf of bread and a piece of cheese
three slices of pizza
the sun over a sailboat
a duck with a fish
a yellow banana
a violet dress
a scarlet mushroom near a snowman
a jack-o'-lantern on a white background
on the left a bee, on the right a ladybug
a couple of cookies
a colour picture of a rainbow
a t-shirt colored green
a brown bear
""".strip().splitlines()


BUILT_IN_UNDERSTANDS = """
a zebra
five apples
six strawberries
a blue cat
a grey mouse
a cat on an orange background
a big cat
a tiny red car
a huge house and a small tree
🦊
🐱 and 🦊
a small red fox to the left of a huge tiger
""".strip().splitlines()

BUILT_IN_HALF_UNDERSTANDS = {
    "seven apples": ["'seven apples' is not understood: this model counts to six"],
    "a dozen eggs": ["'dozen eggs' is not understood: this model counts to six"],
    "some dogs": ["'some' is not understood: give a number up to six"],
    "three purple rainbows": [no_color("purple rainbows", "rainbows")],
    "a watercolor drawing of a rose": [strange("watercolor")],
    "a turquoise car": [strange("turquoise")],
    "a grape": [nothing("grape (did you mean grapes?)")],
    "a zebr": [nothing("zebr (did you mean zebra?)")],
    "a medium cat": [strange("medium")],
}


def test_there_are_enough_examples():
    assert len(HALF_UNDERSTOOD) == 49
    assert len(UNDERSTOOD) >= 40


def test_the_built_in_model_tells_what_it_does_not_understand():
    """Nothing that another vocabulary tells is passed over, but for what this one has more."""
    for prompt, expected in BUILT_IN_HALF_UNDERSTANDS.items():
        assert notes(prompt, BUILT_IN) == expected
    silent = [prompt for prompt in HALF_UNDERSTOOD if not notes(prompt, BUILT_IN)]
    assert silent == [prompt for prompt in BUILT_IN_UNDERSTANDS if prompt in HALF_UNDERSTOOD]
    for prompt in (*UNDERSTOOD, *BUILT_IN_UNDERSTANDS):
        assert notes(prompt, BUILT_IN) == []


def test_the_built_in_vocabulary_is_that_of_its_training_data():
    assert vocabulary_file(len(BUILT_IN["nouns"]), FLUENT) == BUILT_IN
    assert len(BUILT_IN["nouns"]) >= 150


@pytest.mark.parametrize(("prompt", "expected"), HALF_UNDERSTOOD.items())
def test_half_understood_prompts_are_told(prompt, expected):
    assert notes(prompt) == expected


@pytest.mark.parametrize("prompt", UNDERSTOOD)
def test_understood_prompts_are_drawn_without_a_note(prompt):
    assert notes(prompt) == []


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            "two bikes and an apple",
            ["'two bikes' beside another thing: this model counts one kind"],
        ),
        ("a blue cat", [no_color("blue cat", "cats")]),
        ("three red automobiles", []),
        ("a bleu car", [strange("bleu (did you mean blue?)")]),
        ("a big cat", []),
        ("two tomatoes", []),
    ],
)
def test_vocabularies_of_older_models_are_read(prompt, expected):
    found = notes(prompt, OLD)
    assert len(found) == len(expected)
    assert all(note.startswith(start) for note, start in zip(found, expected, strict=True))


def test_words_of_a_lora_are_known_and_may_mean_anything():
    assert notes("a zebra to the left of a cat", lora_words=["zebra"]) == []
    assert notes("two zebras on a blue background", lora_words=["zebra", "background"]) == []
    assert notes("a cat running", lora_words=["running"]) == []
    assert notes("a zebrra", lora_words=["zebra"])[0].endswith(
        "zebrra (did you mean zebra?); --vocabulary lists all words"
    )
    assert notes("a blorp of five cats", lora_words=None) == []


def test_unknown_words_of_a_negative_prompt_count_with_guidance():
    settings = DrawSettings("a cat", negative_prompt="a zebra", guidance_scale=2.0)
    assert list(check_prompts(settings, [None], vocabulary=VOCABULARY)) == [strange("zebra")]
    assert notes("a cat", lora_words=()) == []


# --- other words for the same -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "encoded"),
    [
        ("🍎", "an apple"),
        ("❤️", "a heart"),
        ("💙💙", "two blue hearts"),
        ("a red 🍎 and 🐶🐶🐶", "a red apple and three dogs"),
        ("three 🐭", "three mice"),
        ("🐱🐶🐶", "a cat and two dogs"),
        ("draw🍎please", "draw an apple please"),
        ("Two Doggies", "Two dogs"),
        ("🍅🍅", "two tomatoes"),
        ("a pair of scissors and a pair of cats", "a pair of scissors and a couple of cats"),
        ("aeroplanes on a sky  blue backdrop", "airplanes on a light blue background"),
        ("Can you draw a butterfly, please?", "Can you draw a butterfly"),
        ("your cat as an icon, thanks!", "the cat"),
        ("please", "please"),
        ("a loaf of bread, cheese", "a loaf of bread, piece of cheese"),
    ],
)
def test_words_are_replaced_by_those_of_the_training(prompt, encoded):
    assert translate(prompt, VOCABULARY) == encoded


def test_words_of_loras_stay():
    prompt = "her trainer on my backdrop"
    assert translate(prompt, VOCABULARY) == "the sneaker on the background"
    assert (
        translate(prompt, VOCABULARY, lora_words=["her", "backdrop"])
        == "her sneaker on my backdrop"
    )
    assert translate(prompt, VOCABULARY, lora_words=None) == prompt


def test_other_prompts_are_not_changed():
    for prompt in ("A  red Apple!", "a zebra \N{RIGHT SINGLE QUOTATION MARK}s", "🦊", ""):
        assert translate(prompt, VOCABULARY) == prompt
        assert translate(prompt, None) == prompt
    assert translate("two tomatoes 🍎", OLD) == "two tomatoes 🍎"


def test_the_list_of_words_has_correct_plurals():
    lists = listed(VOCABULARY)
    others = lists["other words for them"]
    assert "tomatoes" in others
    assert {"loaves of bread", "mice", "bikes (bicycle)", "t-shirts (shirt)"} <= set(others)
    words = {word.partition(" (")[0] for word in others}
    assert {*lists["nouns"], *words} >= {*nouns(VOCABULARY)}
    assert "sizes" not in lists and "huge" in listed(OLD)["sizes"]
    assert "yellow banana" in lists["nouns with a color of their own"]
    assert {"🍎", "❤"} <= set(lists["emoji"])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a friendly little frog", "a little frog"),
        ("An angry Cat", "a cat"),
        ("a grumpy orange", "an orange"),
        ("a half-eaten apple", "an apple"),
        ("two sleepy, fluffy cats on blue", "two cats on blue"),
        ("a race car and a zebra", "a car and a zebra"),
        ("an ice bear and an ice cream cone", "a bear and an ice cream cone"),
        ("a light cat on a light blue background", "a cat on a light blue background"),
        ("a red-eyed frog", "a frog"),
        ('a "furry" cat', "a cat"),
        ("a under_score cat", "a cat"),
        ("a zorb\u0301y cat", "a cat"),
        ("a zebra and a red Car", None),
        ("A  red Apple!", None),
        ("a watercolor drawing of a rose", None),
    ],
)
def test_unknown_words_before_a_thing_are_left_out(prompt, expected):
    assert understood(prompt, VOCABULARY) == (expected or prompt)
    assert understood(prompt, VOCABULARY, lora_words=None) == prompt
    assert understood(prompt, None) == prompt


def test_words_of_a_lora_before_a_thing_stay():
    for prompt in ("a zorbo cat", "a zk9 cat"):
        assert understood(prompt, VOCABULARY, lora_words=["zorbo"]) == prompt


def test_negations_do_not_take_the_words_before_them():
    assert notes("a car isn't red") == [no_effect("isn't")]


def test_pictures_of_replaced_words_are_those_of_the_replacement(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    vocabulary |= {"replaced": {"auto": "car"}, "emoji": {"🍎": "apple"}}
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    plain, pipe = (SnapGenPipeline.from_pretrained(f) for f in (model_folder, folder))

    def draw(pipeline, prompt):
        [step] = pipeline.generate(prompt, seed=3, num_inference_steps=1)
        return np.array(step.preview()), step.metadata

    for asked, same in (
        ("a red auto", "a red car"),
        ("🍎", "an apple"),
        ("an odd car", "a car"),
        ("a  red Car", None),
    ):
        picture, metadata = draw(pipe, asked)
        expected, _ = draw(plain, same or asked)
        assert (picture == expected).all()
        assert metadata["prompt"] == asked
        assert metadata.get("encoded_prompt") == same


# --- where notes are printed --------------------------------------------------------------------


def test_a_note_is_printed_for_each_prompt(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red ice\na blue ice\na cat\na cat\n🍎\n")
    common = ("--steps", "1", "--model", str(model_folder), "--output", "out/")
    main(["--prompts-file", "prompts.txt", *common])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines if "names nothing" in line] == [
        ' "a red ice"',
        ' "a blue ice"',
        ' "🍎"',
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a-blue-ice.png",
        "a-cat-1.png",
        "a-cat.png",
        "a-red-ice.png",
        "red-apple.png",
    ]
    main(["a red ice", *common, "--num-images", "2"])
    err = capsys.readouterr().err
    assert err.startswith("note: the prompt names nothing") and err.count("names nothing") == 1


def test_python_prints_the_note_of_every_prompt(model_folder):
    pipe = SnapGenPipeline.from_pretrained(model_folder)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for prompt in ("a red ice", "a blue ice", "a red ice"):
            pipe.generate(prompt)
    assert [w.category for w in found] == [PromptWarning] * 2
    assert str(found[1].message).startswith('"a blue ice": the prompt names nothing')


def test_a_note_about_no_prompt_is_printed_once(capsys):
    with short_warnings():
        for text in ("drawn smaller", "drawn smaller", "drawn larger"):
            warnings.warn(text, stacklevel=1)
    assert capsys.readouterr().err == "note: drawn smaller\nnote: drawn larger\n"


# --- sizes --------------------------------------------------------------------------------------

SHAPES = dataclasses.replace(
    MODEL, image_size=(64, 64), trained_sizes=((64, 64), (32, 64), (64, 32), (128, 128))
)


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        ((64, 64), (64, 64)),
        ((1024, 1024), (128, 128)),
        ((70, 75), (64, 64)),
        ((1024, 1536), (32, 64)),
        ((1024, 1300), (128, 128)),
        ((1024, 1792), (32, 64)),
        ((1792, 1024), (64, 32)),
    ],
)
def test_the_nearest_size_of_the_training_is_drawn(asked, drawn):
    assert trained_size(SHAPES, *asked) == drawn
    assert trained_size(MODEL, *asked) == asked
    resolved = DrawSettings(height=asked[0], width=asked[1]).resolved(SHAPES)
    assert (resolved.height, resolved.width) == drawn


def test_another_size_is_told_or_forced(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(model_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"trained_sizes": [[32, 64]]}))
    common = ("a cat", "--steps", "1", "--model", str(folder), "--height", "96", "--width", "96")
    main([*common, "--output", "near.png"])
    assert "drawn at 64 x 32, the nearest size that this model" in capsys.readouterr().err
    main([*common, "--force-size", "--output", "forced.png"])
    assert capsys.readouterr().err == ""
    values = {name: read_metadata(f"{name}.png") for name in ("near", "forced")}
    assert [(v["width"], v["height"], v["force_size"]) for v in values.values()] == [
        (64, 32, False),
        (96, 96, True),
    ]


def test_pictures_of_older_versions_are_drawn_again_at_their_size(tmp_path, model_folder):
    from mlx_snapgen.metadata import read_settings, save_picture

    [step] = SnapGenPipeline.from_pretrained(model_folder).generate("a cat", num_inference_steps=1)
    old = {name: value for name, value in step.metadata.items() if name != "force_size"}
    path = save_picture(step.preview(), tmp_path / "old.png", metadata=old)
    assert read_settings(path).settings.force_size
    path = save_picture(step.preview(), tmp_path / "new.png", metadata=step.metadata)
    assert not read_settings(path).settings.force_size


def test_the_built_in_model_names_its_size():
    assert FOLDER.config.image_size == (256, 256)
    assert set(FOLDER.config.trained_sizes) == set(FLUENT.shapes)
    assert trained_size(FOLDER.config, 192, 128) == (384, 256)
