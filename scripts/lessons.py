"""What the finetuning examples learn from when no file is given: made here, always the same for a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from stories import stories

SKIES = ("clear", "cloudy", "grey", "bright", "dark")
WINDS = ("a light wind", "a strong wind", "hardly any wind", "wind from the sea")
PLACES = ("the village", "the forest", "the river", "the hills", "the garden", "the old mill")
ENDINGS = (
    "Take an umbrella.",
    "A warm coat will do.",
    "Leave the kite at home.",
    "It is a day for the garden.",
)


def report(rng: random.Random) -> str:
    """A weather report in the words that the stories have, in no order that they know."""
    morning, noon, night = (rng.choice(SKIES) for _ in range(3))
    return (
        f"Weather for {rng.choice(PLACES)}. Morning: {morning}. Noon: {noon}, with {rng.choice(WINDS)}. "
        f"Night: {night}. {rng.choice(ENDINGS)}"
    )


def reports(seed: int, count: int) -> str:
    """A text of weather reports."""
    rng = random.Random(seed)
    return "\n\n".join(report(rng) for _ in range(count))


def _openings(seed: int, count: int) -> Iterator[str]:
    for story in stories(seed, count):
        yield story.split("\n\n")[0]


def questions(seed: int, count: int) -> Iterator[dict[str, str]]:
    """Records of instructions about the sky of a report."""
    rng = random.Random(seed)
    for _ in range(count):
        when, sky = rng.choice(("morning", "noon", "night")), rng.choice(SKIES)
        given = f"The {when} was {sky}."
        yield {"instruction": "How was the sky?", "input": given, "output": f"It was {sky}."}


def labelled(seed: int, count: int) -> Iterator[dict[str, str]]:
    """The first paragraphs of stories, each with the pronoun of its hero."""
    for text in _openings(seed, count):
        words = text.lower().replace(".", " ").replace(",", " ").split()
        yield {"text": text, "label": "she" if words.count("she") > words.count("he") else "he"}


def write_lines(records: Iterator[dict[str, str]], path: Path) -> Path:
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
