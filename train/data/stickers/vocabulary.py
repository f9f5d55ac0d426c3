"""The things of the sticker scenes: nouns with their emoji, colours and backgrounds."""

from dataclasses import dataclass

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.errors import UserError


@dataclass(frozen=True)
class Noun:
    """A thing that one glyph of the font shows.

    Attributes:
        name, plural: everyday English, singular and plural.
        emoji: the character to draw.
        own_colour: the dominant saturated colour, a name of COLOURS, if `recolour` can exchange
            it well; else None.
        synonyms: other words a person might use, singular.
        lost_on: names of backgrounds too close to the glyph's own colours.
    """

    name: str
    plural: str
    emoji: str
    own_colour: str | None
    synonyms: tuple[str, ...]
    lost_on: tuple[str, ...]

    @property
    def recolour(self) -> bool:
        """Whether the glyph can be given another colour."""
        return self.own_colour is not None


MIN_NOUNS = 12  # with fewer there may be no held-out pair to test on
UNCHANGED = ("sheep", "fish", "deer", "squid", "shrimp")


def pluralise(phrase: str) -> str:
    """Regular plural of a noun phrase; what stands before " of " or " with " is the head.

    >>> pluralise("slice of pizza"), pluralise("puppy"), pluralise("fox")
    ('slices of pizza', 'puppies', 'foxes')
    """
    for link in (" of ", " with "):
        head, found, rest = phrase.partition(link)
        if found:
            return pluralise(head) + link + rest
    if phrase.endswith(UNCHANGED):
        return phrase
    if phrase.endswith("y") and phrase[-2] not in "aeiou":
        return phrase[:-1] + "ies"
    if phrase.endswith("leaf"):
        return phrase[:-1] + "ves"
    return phrase + ("es" if phrase.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _split(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(",") if word.strip())


def _noun(line: str) -> Noun:
    first, plural, own_colour, synonyms, lost_on = (
        field.strip() for field in (line + " | | | |").split("|")[:5]
    )
    emoji, name = first.split(" ", 1)
    return Noun(
        name,
        plural or pluralise(name),
        emoji,
        own_colour or None,
        _split(synonyms),
        _split(lost_on),
    )


# emoji name | irregular plural | own colour if exchangeable | synonyms | backgrounds it is lost on
# The order is part of the data: a small model learns the first N, the plainest and most distinct.
_TABLE = """
🍎 apple | | red | | red
🍌 banana | | | | yellow, pink
🚗 car | | red | automobile | red
🐱 cat | | | kitten, kitty | yellow
🐶 dog | | | puppy | pink
⚽ ball | | | soccer ball, football
🐟 fish | fish | blue | | blue
🌸 flower | | pink | blossom | pink
🌳 tree | | | | green
🏠 house | | | home
⭐ star | | yellow | | yellow
❤ heart | | red | love heart | red
🎈 balloon | | red | | red
👕 shirt | | blue | t-shirt | light blue
☂ umbrella | | purple | | blue, purple
🧢 cap | | blue | baseball cap | blue
📕 book | | red | | red
🚌 bus | | | | light blue
🚲 bicycle | | blue | bike | grey
✈ plane | | | airplane | grey, blue
🚀 rocket | | | spaceship | red
⛵ sailboat | | red | boat | red
🦆 duck
🐸 frog | | green | | yellow
🐢 turtle | | green | tortoise | yellow
🦋 butterfly | | orange
🐝 bee | | | bumblebee | grey, green
🐞 ladybug | | red | ladybird | red
🐘 elephant | | | | grey, light blue, pink
🐴 horse | | | pony | yellow
🐷 pig | | pink | | pink
🐮 cow | | | | pink
🦁 lion
🐰 rabbit | | | bunny | grey, light blue, pink
🐻 bear
🐼 panda
🐵 monkey | | | | grey
🐭 mouse | mice | | | grey, light blue, pink
🐔 chicken | | | hen | light blue, pink
🦉 owl
🐧 penguin
🐍 snake | | green | | yellow
🐙 octopus | octopuses | red | | red
🦀 crab | | orange | | red
🐳 whale | | blue | | grey
🍓 strawberry | | red | | red
🍊 orange | | | tangerine
🍋 lemon | | yellow | | yellow
🍉 watermelon | | | slice of watermelon
🍍 pineapple | | | | yellow, green
🍐 pear | | green | | yellow
🥕 carrot | | orange | | green
🍅 tomato | | red | | red
🍄 mushroom | | red | toadstool | red
🍕 pizza | | | slice of pizza | yellow
🍔 hamburger | | | burger, cheeseburger | yellow
🍦 ice cream cone | | | ice cream | yellow, pink
🍩 donut | | brown | doughnut
🎂 cake | | | birthday cake | pink
🍪 cookie | | | biscuit | red, yellow
🥚 egg | | | | yellow
🧀 piece of cheese | pieces of cheese | | wedge of cheese | yellow
🍞 loaf of bread | loaves of bread | | slice of bread | red
☕ cup of coffee | cups of coffee | | coffee cup | light blue, pink
🔑 key | | yellow | | yellow
⏰ alarm clock | | red | clock | red, light blue, pink
🔔 bell | | yellow | | yellow
💡 light bulb | | | lightbulb | yellow
📷 camera
📱 phone | | | smartphone, mobile phone | black
💻 laptop | | | computer | light blue, pink
📺 television | | | tv | green, blue
🎸 guitar | | red | | red
🥁 drum | | red
🎁 gift | | orange | present | red
🪑 chair | | brown | | red
🛏 bed | | blue | | blue
🚪 door | | brown | | red
✏ pencil | | yellow
✂ pair of scissors | pairs of scissors | red | | grey, red, light blue
🔨 hammer | | | | red
👑 crown | | yellow | | yellow
👟 shoe | | blue | sneaker | blue
👗 dress | | blue | | blue
👖 pair of jeans | pairs of jeans | blue | | blue
🎒 backpack | | red | rucksack | red
☀ sun | | yellow | | yellow
🌙 moon | | yellow | crescent moon | yellow
☁ cloud | | | | light blue, pink
⛄ snowman | snowmen | | | light blue, pink
🌵 cactus | cacti | green | | green
🍁 maple leaf | maple leaves | red | leaf | red
🌈 rainbow
🔥 flame | | orange | fire | red
💎 diamond | | blue | gem | light blue
🤖 robot | | | | grey
👻 ghost | | | | light blue, pink
🎃 pumpkin | | orange | jack-o'-lantern | red
🚜 tractor
🌻 sunflower | | | | yellow
🌹 rose | | red | | red
🎄 christmas tree | | | | green
🌴 palm tree | | | | green
🌲 pine tree | | green | fir tree | green
🍀 clover | | green | shamrock | green
🌷 tulip | | pink | | pink
🪴 potted plant | | | | green
🦊 fox | | | | red
🐯 tiger
🐺 wolf | wolves | | | grey, light blue, pink
🐨 koala | | | | grey, light blue, pink
🦒 giraffe | | | | red, yellow
🦓 zebra
🦛 hippo | | | hippopotamus | grey
🦏 rhino | | | rhinoceros | grey
🐪 camel | | | | yellow
🐊 crocodile | | green | alligator | green
🦎 lizard | | green | gecko | green
🐿 squirrel | | | chipmunk | grey
🦔 hedgehog
🦇 bat
🦅 eagle
🦜 parrot | | | | green
🦩 flamingo | | pink | | pink
🦚 peacock | | | | green
🦢 swan | | | | light blue, pink
🐓 rooster
🐤 chick | | yellow | baby chick | yellow
🦃 turkey
🕊 dove | | | | light blue, pink
🦈 shark | | | | grey
🐬 dolphin | | blue | | blue
🦭 seal | | | | light blue, pink
🐡 pufferfish | pufferfish | | blowfish | pink
🦐 shrimp | shrimp | orange | prawn | red
🦞 lobster | | red | | red
🦑 squid | squid | pink | | pink
🐌 snail | | | | red, yellow, pink
🐛 caterpillar | | green | | yellow
🐜 ant | | | | green
🕷 spider | | | | grey, green, purple
🦂 scorpion | | | | yellow
🦗 cricket | | | grasshopper | grey
🐑 sheep | sheep
🐐 goat | | | | grey
🦌 deer | deer | | | red
🦘 kangaroo | | | | red
🦥 sloth | | | | grey
🦦 otter
🦨 skunk
🦝 raccoon | | | | light blue, pink
🐦 bird | | blue | | blue
🦕 dinosaur | | green | brontosaurus | green
🐉 dragon | | green | | green
🦄 unicorn | | | | light blue, pink
🐚 seashell | | | shell | light blue, pink
🦙 llama | | | | light blue, pink
🦫 beaver | | | | grey
🐹 hamster | | | | yellow
🥑 avocado | | | | pink
🍆 eggplant | | purple | aubergine | grey, purple
🥦 head of broccoli | heads of broccoli | | | green
🥒 cucumber | | green | | green
🌶 chili pepper | | red | chili | red
🫑 bell pepper | | green | | green
🌽 ear of corn | ears of corn | | corn cob | yellow, green
🥔 potato | potatoes | | | grey
🧅 onion | | | | yellow, pink
🧄 garlic bulb | | | | light blue, pink
🥝 kiwi
🥭 mango | mangoes | | | yellow
🥥 coconut
🍑 peach | | | | red
🥐 croissant | | | | yellow
🥨 pretzel | | | | red
🥖 baguette | | | | yellow
🥞 stack of pancakes | stacks of pancakes | | | yellow
🧇 waffle | | | | red, yellow
🌭 hot dog | | | hotdog | yellow
🍟 box of fries | boxes of fries | | | red, yellow
🌮 taco | | | | yellow
🌯 burrito | burritos | | wrap | pink
🥪 sandwich | | | | pink
🍗 chicken leg | | | drumstick | red
🥩 steak | | | | red, pink
🍙 rice ball
🍜 bowl of noodles | bowls of noodles | | bowl of ramen | pink
🥗 salad | | | bowl of salad
🍿 box of popcorn | boxes of popcorn
🧁 cupcake | | | muffin | pink
🥧 pie | | | | yellow
🍫 chocolate bar
🍬 candy | | pink | | pink
🍭 lollipop
🍮 pudding | | | custard | pink
🍯 jar of honey | jars of honey | | honey pot | red
🥛 glass of milk | glasses of milk | | | grey, light blue, pink
🍷 glass of wine | glasses of wine | | wine glass | grey, light blue, pink
🍺 mug of beer | mugs of beer | | beer mug
🍹 cocktail
🧃 juice box | | green | | grey, green
🫖 teapot | | red | | red
🥤 cup with a straw | cups with straws | | soft drink | grey, light blue
🍼 baby bottle | | | | light blue, pink
🥄 spoon | | | | grey, light blue, pink
🔪 knife | knives | | kitchen knife | light blue, pink
🚕 taxi | | yellow | cab | yellow
🚓 police car
🚑 ambulance | | | | light blue, pink
🚒 fire truck | | red | fire engine | red
🚚 truck | | | lorry
🛵 scooter | | yellow | moped | yellow
🏍 motorcycle | | red | motorbike
🚁 helicopter | | yellow | | yellow
🚂 train | | | steam train, locomotive
🚤 speedboat | | | motorboat | red
🛶 canoe | | | | red
🚢 ship | | | | green
⚓ anchor | | blue | | grey, light blue
🛸 flying saucer | | | ufo | grey, green
🛹 skateboard | | | | black
🛼 roller skate | | blue | | blue
🎡 ferris wheel | | | | grey
🚦 traffic light | | | | black
🏰 castle | | | | grey
⛺ tent | | orange | | red, yellow
🌋 volcano | volcanoes
⛪ church | | | | grey, light blue, pink
🏭 factory | | | | grey, light blue
⛲ fountain | | | | light blue
🏝 desert island | | | island
🎩 top hat | | | | black
👒 sun hat | | | straw hat | yellow, pink
👓 pair of glasses | pairs of glasses | | | grey
🧣 scarf | scarves | red | | red
🧤 pair of gloves | pairs of gloves | blue | | grey, light blue
🧥 coat | | blue | jacket
🧦 pair of socks | pairs of socks | | | light blue, pink
👠 high heel | | red | | red
👢 boot | | orange | | red
👙 bikini | | red | | red
👜 handbag | | brown | | red, yellow
👛 purse | | pink
💼 briefcase | | brown
🧳 suitcase | | blue | | blue
⌚ watch | | | wristwatch
💍 ring | | | diamond ring | grey, light blue, pink
💄 lipstick | | red | | red
🎀 bow | | red | ribbon | red
🎾 tennis racket | | | racket | grey
🏀 basketball | | orange | | red
🏈 american football | | brown | | red
⚾ baseball | | | | light blue, pink
🏐 volleyball | | | | light blue, pink
🎯 dartboard | | | target | red
🏆 trophy | | orange | | yellow
🎲 die | dice | | | light blue, pink
🧩 puzzle piece | | | jigsaw piece | green
🧸 teddy bear | | | | red
🪁 kite
🪀 yo-yo | yo-yos | red | | red
🎮 game controller | | | gamepad | grey, green
♟ chess pawn | | | pawn | grey, green
🎺 trumpet | | yellow | | yellow
🎷 saxophone | | yellow | | yellow
🎻 violin | | red | fiddle | red
🎹 piano keyboard | | | piano
🎤 microphone | | | | grey
🎧 pair of headphones | pairs of headphones | | | green
📻 radio | radios | orange | | yellow
🔍 magnifying glass | | | | grey, green, blue, purple
🔦 flashlight | | | torch | green, blue
🔒 padlock | | yellow | lock | yellow
🧲 magnet | | red | | red
🔧 wrench | | | spanner | grey, light blue
🪛 screwdriver | | red | | red
🪓 axe | | | | yellow, pink
⚙ gear | | | cog | grey, light blue
🧰 toolbox | | red | | red
🧱 brick wall | | | | red
🪜 ladder | | brown | | yellow
🧹 broom | | | | yellow
🪣 bucket | | blue | | blue
🧺 basket | | | | yellow
🧻 roll of toilet paper | rolls of toilet paper | | | light blue, pink
🪥 toothbrush | | orange
🧼 bar of soap | bars of soap | | | pink
🛁 bathtub | | | | light blue, pink
🚽 toilet | | | | light blue, pink
🛋 couch | | blue | sofa | blue
🪞 mirror | | | | light blue
🏮 lantern | | red | | red
⏳ hourglass | | | | grey
🧭 compass
🔭 telescope | | | | light blue
🔬 microscope | | | | grey, light blue
💊 pill | | | | red, yellow
🌡 thermometer | | | | grey, light blue
🧪 test tube | | green
🖨 printer | | | | grey
🖱 computer mouse | computer mice | | | light blue, pink
💾 floppy disk
🎥 movie camera
📎 paperclip | | | | grey, light blue
📌 pushpin | | red | thumbtack | red
📏 ruler | | yellow | | yellow
📦 box | | brown | cardboard box | grey
📫 mailbox | | blue | | blue
🗑 trash can | | | garbage can | grey, light blue
🛒 shopping cart | | | | grey, light blue
💰 money bag | | yellow | bag of money | yellow
🛡 shield | | | | grey, light blue, pink
🏹 bow and arrow | bows and arrows | | | red
🗡 dagger | | | | light blue
🔮 crystal ball | | purple | | grey, purple
💣 bomb
🧨 firecracker | | red | | red
💀 skull | | | | light blue, pink
👽 alien | | | | grey, light blue, pink
🤡 clown | | | | pink
😀 smiley face | | | smiley | yellow
❄ snowflake | | blue | | light blue
⚡ lightning bolt | | yellow | | yellow
💧 drop of water | drops of water | blue | water drop
🌊 wave | | | ocean wave | blue
🌍 globe | | | | blue
🪐 planet | | | | pink
👄 mouth
🦷 tooth | teeth | | | light blue, pink
🦴 bone | | | | pink
✋ hand | | | | yellow
🧠 brain | | | | pink
👶 baby | | | | yellow
👁 eye | | | | grey
👂 ear | | | | yellow
🪶 feather | | brown | | red
🧶 ball of yarn | balls of yarn | pink | | red
🧵 spool of thread | spools of thread | blue | | blue
🎨 palette | | | paint palette | yellow
🖌 paintbrush | | blue | | blue
🖍 crayon | | red | | red
🖊 pen | | blue | | blue
🪂 parachute
🥊 boxing glove | | red | | red
⛸ ice skate | | | | light blue, pink
🥏 frisbee | | blue
🏓 ping pong paddle | | red | | red
🛷 sled | | | | red, yellow
🪵 log | | | | grey, red
🧊 ice cube | | | | light blue
🏺 vase | | brown | amphora | red
🧯 fire extinguisher | | red | | red
🧽 sponge | | yellow | | yellow
☎ telephone | | red | | red
🔋 battery | | green | | green
🪗 accordion | | red | | red
🪙 coin | | | gold coin | yellow
🎪 circus tent | | orange | | red
🕯 candle | | | | light blue, pink
🥇 gold medal | | | medal | yellow
🍣 piece of sushi | pieces of sushi | | | red
🥜 peanut | | | | yellow
🌰 chestnut | | brown | | red
"""

NOUNS: tuple[Noun, ...] = tuple(_noun(line) for line in _TABLE.strip().splitlines())

# Hue in degrees, saturation and value in [0, 1] of a recoloured glyph's median pixel.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0, 0.85, 0.88),
    "orange": (27, 0.93, 0.98),
    "yellow": (51, 0.82, 0.99),
    "green": (125, 0.70, 0.66),
    "blue": (217, 0.82, 0.88),
    "purple": (275, 0.66, 0.74),
    "pink": (332, 0.42, 1.00),
    "brown": (22, 0.62, 0.50),
    "black": (230, 0.10, 0.17),
    "white": (220, 0.03, 0.96),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "grey": (150, 150, 150),
    "red": (222, 52, 46),
    "yellow": (255, 222, 70),
    "green": (72, 174, 80),
    "blue": (44, 96, 214),
    "light blue": (172, 216, 250),
    "pink": (255, 178, 208),
    "purple": (130, 70, 190),
}

# Backgrounds on which a recoloured glyph would not stand out, its own name included.
COLOUR_LOST_ON: dict[str, tuple[str, ...]] = {
    "red": ("red",),
    "orange": ("red", "yellow"),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue", "purple"),
    "purple": ("purple", "blue"),
    "pink": ("pink",),
    "brown": ("red", "black"),
    "black": ("black",),
    "white": ("white", "light blue"),
}


def first_nouns(num_nouns: int | None) -> tuple[Noun, ...]:
    """The first `num_nouns` of NOUNS, or all; a UserError if there are not so many."""
    num_nouns = len(NOUNS) if num_nouns is None else num_nouns
    if not MIN_NOUNS <= num_nouns <= len(NOUNS):
        raise UserError(f"num_nouns is {num_nouns}; it must lie in {MIN_NOUNS} ... {len(NOUNS)}")
    return NOUNS[:num_nouns]


def vocabulary_file(num_nouns: int | None) -> dict[str, list[str]]:
    """The words of a model that was trained on the first `num_nouns` nouns (None: on all)."""
    nouns = first_nouns(num_nouns)
    return {
        "nouns": [n.name for n in nouns],
        "other_words": sorted({w for n in nouns for w in (n.plural, *n.synonyms)}),
        "colours": list(COLOURS),
        "recolourable": [n.name for n in nouns if n.recolour],
        "backgrounds": list(BACKGROUNDS),
    }


def known_nouns(components: Components) -> int:
    """How many of the vocabulary's nouns, from the first, the model has learned."""
    names = (components.vocabulary or {}).get("nouns")
    if names is None:
        raise UserError("the model has no vocabulary.json: say --num-nouns")
    if names != [noun.name for noun in NOUNS[: len(names)]]:
        raise UserError("the model knows other nouns than this vocabulary: say --num-nouns")
    return len(names)
