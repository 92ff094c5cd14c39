"""Pictures and descriptions of the demo shop's items, drawn with Pillow and written from small word lists.

An item has five hidden attributes. The picture shows its shape, colour and pattern. The description may mention or omit
any of the five; only it reveals material and occasion.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from distrec.data import keyed

# attribute -> value -> words that a description may use for it
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "circle": ("round", "circular", "disc-shaped"),
        "square": ("square", "four-sided", "box-shaped"),
        "triangle": ("triangular", "three-sided", "wedge-shaped"),
        "star": ("star-shaped", "starry", "five-pointed"),
        "hexagon": ("hexagonal", "six-sided", "honeycomb-shaped"),
        "cross": ("cross-shaped", "plus-shaped", "four-armed"),
        "crescent": ("crescent-shaped", "moon-shaped", "sickle-like"),
        "heart": ("heart-shaped", "heart-like", "valentine-shaped"),
    },
    "colour": {
        "red": ("red", "crimson", "scarlet"),
        "orange": ("orange", "tangerine", "apricot"),
        "yellow": ("yellow", "lemon", "golden"),
        "green": ("green", "emerald", "leafy green"),
        "blue": ("blue", "navy", "sky-blue"),
        "purple": ("purple", "violet", "plum"),
        "pink": ("pink", "rosy", "blush"),
        "grey": ("grey", "charcoal", "silvery"),
    },
    "pattern": {
        "plain": ("single tone", "plain surface", "uniform finish"),
        "stripes": ("set of stripes", "striped look", "row of bands"),
        "dots": ("scatter of dots", "dotted look", "speckled design"),
        "checks": ("checked design", "grid of squares", "chequered look"),
        "rings": ("set of rings", "target of concentric rings", "ringed design"),
        "zigzag": ("zigzag line", "zigzag design", "chevron look"),
    },
    "material": {
        "wood": ("oak", "walnut wood", "birch wood"),
        "wool": ("felted wool", "knitted yarn", "merino wool"),
        "glass": ("blown glass", "frosted glass", "recycled glass"),
        "metal": ("brushed steel", "hammered brass", "cast iron"),
        "paper": ("folded paper", "pressed card", "papier-mâché"),
        "clay": ("glazed stoneware", "terracotta", "fired clay"),
    },
    "occasion": {
        "garden": ("the garden", "a balcony full of plants", "the terrace"),
        "kitchen": ("the kitchen", "a breakfast table", "the pantry shelf"),
        "nursery": ("the nursery", "a child's bedroom", "the playroom"),
        "office": ("the desk", "a home office", "the reading corner"),
        "party": ("a birthday party", "a festive evening", "wedding tables"),
        "travel": ("the camper van", "a weekend bag", "long train rides"),
    },
}
ATTRIBUTES = tuple(WORDS)
VALUES = {attribute: tuple(words) for attribute, words in WORDS.items()}

_MENTIONED = {"shape": 0.4, "colour": 0.4, "pattern": 0.35, "material": 0.95, "occasion": 0.95}
_FRAMES: dict[str, tuple[str, ...]] = {
    "shape": (
        "Its outline is {}.",
        "People first notice how {} it is.",
        "We cut every piece by hand into a {} form.",
        "The {} silhouette stands out on a wall.",
    ),
    "colour": (
        "The {} shade was mixed in our own workshop.",
        "It comes in {} only.",
        "Expect a warm {} tint in daylight.",
        "A touch of {} for a quiet room.",
    ),
    "pattern": (
        "Look closer and you find a {}.",
        "The front shows a {}.",
        "We finished it with a {}.",
        "A {} keeps it from looking like any other.",
    ),
    "material": (
        "Made of {} by a family business.",
        "The maker works in {} and nothing else.",
        "You will feel the {} as soon as you pick it up.",
        "Solid {}, meant to last.",
    ),
    "occasion": (
        "It belongs in {}.",
        "Most customers buy it for {}.",
        "Just the thing for {}.",
        "We had {} in mind when we designed it.",
    ),
}
# Sentences that mention a value the item does not have, so that a description is more than a list of tags.
_DECOYS = (
    ("colour", "Goes well with {} walls."),
    ("material", "Keep it away from rough {}."),
    ("occasion", "Not meant for {}."),
    ("shape", "Our {} edition sold out last year."),
)
_FILLERS = (
    "Ships within three days.",
    "A small gift that needs no explanation.",
    "Wipe clean with a dry cloth.",
    "Each one differs a little from the next.",
    "Returned pieces find a second home.",
    "Comes in a box without plastic.",
    "Designed on a rainy afternoon.",
    "The screws are included.",
    "About as wide as a hand.",
    "One of our oldest designs.",
)
_NAMES = (
    "Alva",
    "Bruno",
    "Cleo",
    "Dune",
    "Esra",
    "Fjord",
    "Gala",
    "Hugo",
    "Iris",
    "Juno",
    "Koto",
    "Luma",
    "Milo",
    "Nori",
)
_KINDS = ("ornament", "keepsake", "decoration", "charm", "wall piece", "paperweight", "tray", "plaque")

_RGB = {
    "red": (200, 40, 45),
    "orange": (232, 128, 40),
    "yellow": (236, 204, 60),
    "green": (62, 150, 76),
    "blue": (52, 98, 190),
    "purple": (128, 66, 160),
    "pink": (232, 140, 172),
    "grey": (120, 124, 130),
}
_SIZE, _OVERSAMPLING = 96, 2


def describe(values: dict[str, str], seed: int, item: int) -> tuple[str, str]:
    """Title and description of an item with attribute `values`; they omit some attributes, and some words mislead."""
    dice = _dice(("demo-words", seed, item))

    def pick(options: tuple[str, ...]) -> str:
        return options[int(next(dice) * len(options))]

    title = f"{pick(_NAMES)} {pick(_KINDS)} no. {100 + item}"
    sentences = [
        pick(_FRAMES[attribute]).format(pick(WORDS[attribute][values[attribute]]))
        for attribute in ATTRIBUTES
        if next(dice) < _MENTIONED[attribute]
    ]
    if next(dice) < 0.3:
        attribute, frame = _DECOYS[int(next(dice) * len(_DECOYS))]
        others = tuple(value for value in VALUES[attribute] if value != values[attribute])
        sentences.append(frame.format(pick(WORDS[attribute][pick(others)])))
    sentences += [pick(_FILLERS) for _ in range(1 + int(next(dice) * 3))]
    order = sorted(range(len(sentences)), key=[next(dice) for _ in sentences].__getitem__)
    return title, " ".join(sentences[at] for at in order)


def picture(values: dict[str, str], seed: int, item: int) -> bytes:
    """A 96 x 96 JPEG of the item: its shape in its colour and pattern, with random angle, place, light and grain."""
    dice = _dice(("demo-picture", seed, item))

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(dice)

    size = _SIZE * _OVERSAMPLING
    colour = tuple(_byte(channel + between(-22, 22)) for channel in _RGB[values["colour"]])
    towards = 255 if next(dice) < 0.5 else 0
    second = tuple(_byte(channel + between(0.35, 0.6) * (towards - channel)) for channel in colour)
    ground = tuple(_byte(between(205, 250)) for _ in range(3))

    surface = Image.new("RGB", (size, size), colour)
    _draw_pattern(ImageDraw.Draw(surface), values["pattern"], size, between(0.09, 0.15) * size, second)
    surface = surface.rotate(between(-20, 20), Image.Resampling.BILINEAR, fillcolor=colour)

    angle, radius = between(-0.3, 0.3), between(0.28, 0.42) * size
    x, y = (size / 2 + between(-0.07, 0.07) * size for _ in range(2))
    corners = [
        (
            round(x + radius * (a * np.cos(angle) - b * np.sin(angle))),
            round(y + radius * (a * np.sin(angle) + b * np.cos(angle))),
        )
        for a, b in _outline(values["shape"])
    ]
    mask = Image.new("L", (size, size), 0)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    image = Image.composite(surface, Image.new("RGB", (size, size), ground), mask).resize(
        (_SIZE, _SIZE), Image.Resampling.BOX
    )
    grain = keyed.uniform(("demo-grain", seed, item), 0, _SIZE * _SIZE).reshape(_SIZE, _SIZE, 1) * 24 - 12
    pixels = np.clip(np.rint(np.asarray(image) * between(0.85, 1.05) + grain), 0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=85)
    return sink.getvalue()


def _dice(key: tuple[str | int, ...]) -> Iterator[float]:
    """Uniform numbers of stream `key`, one at a time; no item uses as many as 128."""
    return iter(keyed.uniform(key, 0, 128).tolist())


def _byte(value: float) -> int:
    return int(min(max(round(value), 0), 255))


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners (x, y) of a shape within the unit circle."""

    def regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
        turns = [2 * np.pi * k / corners - np.pi / 2 for k in range(corners)]
        return [
            ((inner if k % 2 else 1.0) * np.cos(t), (inner if k % 2 else 1.0) * np.sin(t)) for k, t in enumerate(turns)
        ]

    if shape == "circle":
        return regular(48)
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "triangle":
        return regular(3)
    if shape == "star":
        return regular(10, inner=0.42)
    if shape == "hexagon":
        return regular(6)
    if shape == "cross":
        a, b = 0.32, 0.95
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if shape == "crescent":
        outer = np.linspace(-0.75 * np.pi, 0.75 * np.pi, 33)
        tips = np.cos(outer[0])
        inner = [
            (tips + (0.28 - tips) * np.cos(t), np.sin(outer[-1]) * np.sin(t))
            for t in np.linspace(np.pi / 2, -np.pi / 2, 25)
        ]
        return [(np.cos(t), np.sin(t)) for t in outer] + inner
    return [  # heart
        (np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16)
        for t in np.linspace(0, 2 * np.pi, 48, endpoint=False)
    ]


def _draw_pattern(draw: ImageDraw.ImageDraw, pattern: str, size: int, step: float, ink: tuple[int, ...]) -> None:
    """Cover the whole square with a pattern whose period is about `step` pixels."""
    half = max(round(step / 2), 2)
    period = 2 * half
    marks = range(-period, size + period, period)
    if pattern == "stripes":
        for at in marks:
            draw.rectangle((at, 0, at + half - 1, size), fill=ink)
    elif pattern == "dots":
        for row, top in enumerate(marks):
            for left in marks:
                at = left + half * (row % 2)
                draw.ellipse((at, top, at + half, top + half), fill=ink)
    elif pattern == "checks":
        for row, top in enumerate(range(-period, size + period, half)):
            for left in marks:
                at = left + half * (row % 2)
                draw.rectangle((at, top, at + half - 1, top + half - 1), fill=ink)
    elif pattern == "rings":
        for radius in range(half, size, period):
            box = (size // 2 - radius, size // 2 - radius, size // 2 + radius, size // 2 + radius)
            draw.ellipse(box, outline=ink, width=max(half // 2, 2))
    elif pattern == "zigzag":
        for top in marks:
            line = [(left, top + half * (turn % 2)) for turn, left in enumerate(range(-half, size + period, half))]
            draw.line(line, fill=ink, width=max(half // 2, 2))
