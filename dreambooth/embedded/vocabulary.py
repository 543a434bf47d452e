"""The words that the embedded backbone knows: class nouns and their drawings, contexts, colours, accessories, styles.

The contexts, accessories and properties are DreamBench's own prompt words (Ruiz et al. 2023, "DreamBooth", the
object and live-subject prompt lists), so that its prompts can be drawn as they stand.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """A class noun: the emoji names that draw it, and whether it is alive (and so can wear things)."""

    word: str
    emoji: tuple[str, ...]
    live: bool = False


def _nouns(live: bool, table: str) -> list[Noun]:
    rows = (line.split(":") for line in table.strip().splitlines())
    return [Noun(word.strip(), tuple(names.split()), live) for word, names in rows]


NOUNS: dict[str, Noun] = {
    noun.word: noun
    for noun in [
        *_nouns(
            True,
            """
            dog: dog dog-face poodle guide-dog fx/dog fx/dogside
            cat: cat cat-face black-cat fx/cat fx/catside
            bear: bear fx/bear
            panda: panda fx/pandaface
            lion: lion
            tiger: tiger tiger-face fx/tiger fx/tigerside
            horse: horse horse-face fx/horse fx/horseface
            cow: cow cow-face fx/cow fx/cowface
            pig: pig pig-face fx/pig fx/pigside
            mouse: mouse mouse-face fx/mouse fx/mouseside
            rabbit: rabbit rabbit-face fx/bunny fx/bunnyside
            fox: fox
            wolf: wolf fx/wolfface
            monkey: monkey monkey-face fx/monkey fx/monkeyface
            elephant: elephant
            giraffe: giraffe
            sheep: ewe ram fx/sheep
            frog: frog
            penguin: penguin
            owl: owl
            duck: duck
            chicken: chicken rooster
            """,
        ),
        *_nouns(
            False,
            """
            backpack: backpack fx/schoolsatchel
            stuffed animal: teddy-bear
            bowl: bowl-with-spoon steaming-bowl pot-of-food
            can: canned-food
            candle: candle
            clock: mantelpiece-clock alarm-clock
            sneaker: running-shoe fx/mensrunner
            toy: robot alien-monster nesting-dolls yo-yo
            boot: womans-boot hiking-boot fx/boot
            glasses: glasses sunglasses
            cartoon: ogre goblin ghost
            teapot: teapot
            vase: amphora
            turtle: turtle
            fish: fish tropical-fish
            whale: whale spouting-whale
            octopus: octopus
            butterfly: butterfly
            car: automobile sport-utility-vehicle
            bus: bus
            train: locomotive
            bicycle: bicycle
            boat: sailboat
            airplane: airplane small-airplane
            rocket: rocket
            umbrella: umbrella
            chair: chair
            cup: hot-beverage teacup-without-handle
            balloon: balloon
            ball: soccer-ball basketball
            camera: camera
            crown: crown
            apple: red-apple green-apple
            banana: banana
            pizza: pizza fx/sliceofpizza
            hamburger: hamburger
            cake: birthday-cake shortcake
            mushroom: mushroom
            strawberry: strawberry
            cactus: cactus
            """,
        ),
    ]
}

# Things that stand about in the backgrounds; they are no class nouns.
PROPS: dict[str, tuple[str, ...]] = {
    "palm": ("palm-tree",),
    "tree": ("deciduous-tree",),
    "evergreen": ("evergreen-tree",),
    "sunflower": ("sunflower",),
    "leaf": ("fallen-leaf", "maple-leaf"),
    "person": ("person-standing", "person-walking"),
}

CONTEXTS: dict[str, str] = {
    "jungle": "in the jungle",
    "snow": "in the snow",
    "beach": "on the beach",
    "cobblestone": "on a cobblestone street",
    "fabric": "on top of pink fabric",
    "wood": "on top of a wooden floor",
    "city": "with a city in the background",
    "mountain": "with a mountain in the background",
    "house": "with a blue house in the background",
    "forest rug": "on top of a purple rug in a forest",
    "wheat": "with a wheat field in the background",
    "autumn": "with a tree and autumn leaves in the background",
    "eiffel": "with the Eiffel Tower in the background",
    "water": "floating on top of water",
    "milk": "floating in an ocean of milk",
    "sunflowers": "on top of green grass with sunflowers around it",
    "mirror": "on top of a mirror",
    "sidewalk": "on top of the sidewalk in a crowded street",
    "dirt": "on top of a dirt road",
    "white rug": "on top of a white rug",
    "night": "at night",
}

ACCESSORIES: dict[str, str] = {
    "red hat": "wearing a red hat",
    "santa hat": "wearing a santa hat",
    "rainbow scarf": "wearing a rainbow scarf",
    "top hat": "wearing a black top hat and a monocle",
    "chef": "in a chef outfit",
    "firefighter": "in a firefighter outfit",
    "police": "in a police outfit",
    "pink glasses": "wearing pink glasses",
    "yellow shirt": "wearing a yellow shirt",
    "wizard": "in a purple wizard outfit",
}

# Hue in turns, saturation and value, as in HSV.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.995, 0.88, 0.93),
    "purple": (0.77, 0.70, 0.80),
    "blue": (0.60, 0.82, 0.95),
    "green": (0.35, 0.78, 0.75),
    "yellow": (0.145, 0.85, 1.00),
    "pink": (0.92, 0.48, 1.00),
}

PROPERTIES: tuple[str, ...] = ("shiny", "wet", "cube shaped")
MARKINGS: tuple[str, ...] = ("spotted", "striped")
STYLES: tuple[str, ...] = ("a painting of", "a pencil drawing of", "a mosaic of")
VIEWS: tuple[str, ...] = ("a close-up photo of", "an upside down photo of")

# Drawings kept out of pretraining: emoji set and name, for each held-out subject. What they are called follows
# DreamBench: the class noun, or the noun and a number.
HELD_OUT: dict[str, tuple[str, str]] = {
    "dog": ("dog", "fluent3d.dog-face"),
    "dog2": ("dog", "twemoji.guide-dog"),
    "dog3": ("dog", "noto.poodle"),
    "cat": ("cat", "fluent3d.cat-face"),
    "cat2": ("cat", "noto.black-cat"),
    "rabbit": ("rabbit", "fluent3d.rabbit-face"),
    "backpack": ("backpack", "fluent3d.backpack"),
    "clock": ("clock", "fluent3d.mantelpiece-clock"),
    "clock2": ("clock", "noto.alarm-clock"),
    "boot": ("boot", "fluent3d.womans-boot"),
    "toy": ("toy", "fluent3d.robot"),
    "toy2": ("toy", "twemoji.nesting-dolls"),
    "cup": ("cup", "noto.hot-beverage"),
    "car": ("car", "fluent3d.sport-utility-vehicle"),
}

# Drawings that are no good picture of their noun: a smiley behind sunglasses, a ball in its hoop, a framed boat.
UNFIT: frozenset[str] = frozenset({"fx.sunglasses", "noto1.basketball", "fx.sailboat"})


def is_held_out(noun: str, drawing: str) -> bool:
    """Whether a drawing is kept out of pretraining: a held-out one, or its twin in Fluent's flat or 3D set."""
    twin = {"fluent": "fluent3d", "fluent3d": "fluent"}
    kept, name = drawing.split(".", 1)
    names = {drawing, f"{twin.get(kept, kept)}.{name}"}
    return any(noun == held_noun and held in names for held_noun, held in HELD_OUT.values())
