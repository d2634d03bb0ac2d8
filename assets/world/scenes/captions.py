"""The words of the world, and how facts become a caption."""

from __future__ import annotations

from collections.abc import Sequence

from .chance import Rng

KINDS = ("nature landscape", "red taxi in traffic", "portrait of a man on the beach")
LANDSCAPE, TRAFFIC, PORTRAIT = KINDS

VOCABULARY = """
    a an and at in of on next the to under with without wearing facing left right front
    nature landscape lake trees fir forest mountains cabin wooden house
    small large big wide huge little few some many lot dense snowy
    red taxi traffic heavy road city street buildings tall houses car bus van rain
    portrait man beach bald hair hat cap beanie straw bucket sunglasses shirt striped
    long short curly afro palm tree parasol sailboat boat
    dawn dusk sunset night day sunny morning evening sky cloudy clear
    spring summer autumn winter
    black brown blond white grey blue yellow green teal orange purple pink cream
"""
WORDS: tuple[str, ...] = tuple(sorted(set(VOCABULARY.split())))

BARE = 0.3  # how often a caption is the kind's base prompt and nothing else
LONGEST = 20  # words in a caption

HOUR_PHRASES = {
    "dawn": "at dawn, in the morning",
    "day": "under a blue sky, on a sunny day",
    "dusk": "at dusk, in the evening",
    "sunset": "at sunset",
    "night": "at night",
    "grey": "under a grey sky, on a grey day",
}


def hour_phrase(rng: Rng, hour: str, clouds: int) -> str:
    """The time of day in words, or what the sky is like."""
    if hour == "day" and (clouds == 0 or clouds >= 4) and rng.chance(0.6):
        return "under a clear sky" if clouds == 0 else "under a cloudy sky"
    return rng.one_of(HOUR_PHRASES[hour])


def a(thing: str) -> str:
    """The thing with its article."""
    return ("an " if thing[0] in "aeiou" else "a ") + thing


def some_of(rng: Rng, facts: Sequence[str], most: int = 3) -> list[str]:
    """One to `most` of the facts, fewer rather than more, in any order."""
    count = min(1 + rng.chance(0.55) + rng.chance(0.35), most)
    return rng.shuffled(facts)[:count]


def sentence(rng: Rng, subject: str, facts: Sequence[str]) -> str:
    """The subject, what it is with and without, and when; facts carry their own preposition."""
    having = [fact.removeprefix("with ") for fact in facts if fact.startswith("with ")]
    lacking = [fact for fact in facts if fact.startswith("without ")]
    when = [fact for fact in facts if not fact.startswith(("with ", "without "))]
    things = (["with " + " and ".join(having)] if having else []) + lacking
    parts = when + things if rng.chance(0.2) else things + when
    words = " ".join((subject, *parts))
    return words if len(words.split()) <= LONGEST else sentence(rng, subject, facts[:-1])
