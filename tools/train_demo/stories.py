"""What stories does the demo model tell?"""

import random

from .words import pick


def short_story(rng: random.Random, hero: str) -> str:
    """Return a story of some 130 tokens about `hero`."""
    name = _name(rng)
    return " ".join((_opening(rng, hero, name), _event(rng, name, "One day"), _closing(hero, name)))


def long_story(rng: random.Random, hero: str) -> str:
    """Return a story of some 350 tokens about `hero`: a whole day, hour by hour."""
    name = _name(rng)
    hours = ("In the morning", "At noon", "In the afternoon", "In the evening")
    events = [_event(rng, name, hour) for hour in hours]
    return "\n\n".join((_opening(rng, hero, name), *events, _closing(hero, name)))


def haiku(rng: random.Random, subject: str) -> str:
    """Return three lines about `subject`."""
    first = pick(rng, "Snow on the high road", "Mist on the cold hill", "Wind in the long grass")
    second = pick(rng, f"a {subject} waits for the sun", f"a {subject} walks slowly home")
    third = pick(rng, "the train moves again", "the bells ring softly", "then the stars come out")
    return f"{first},\n{second},\n{third}."


def _name(rng: random.Random) -> str:
    return pick(rng, "Lola", "Inti", "Sol", "Luna", "Wayra")


def _opening(rng: random.Random, hero: str, name: str) -> str:
    kind = pick(rng, "small", "brave", "clever", "quiet", "happy")
    place = pick(
        rng,
        "in a village high in the mountains",
        "in a white house by the lake",
        "at the edge of a green forest",
        "on a farm near the sea",
    )
    wish = pick(
        rng,
        "to see what was behind the last hill",
        "to carry a load all the way to the market",
        "to find a friend",
        "to learn the songs of the wind",
    )
    return (
        f"Once upon a time there was a {kind} {hero} called {name}. {name} lived {place} "
        f"and wanted nothing more than {wish}."
    )


def _event(rng: random.Random, name: str, when: str) -> str:
    thing = pick(rng, "a red blanket", "an old map", "a silver bell", "a basket of apples")
    where = pick(rng, "under a stone", "beside the road", "near the bridge", "behind the mill")
    other = pick(rng, "a mule", "an old arriero", "a fox", "a child", "an owl")
    speech = pick(
        rng,
        "Take it with you, the road is long.",
        "Share it, and it will never be too heavy.",
        "Follow the river, it knows the way.",
        "Wait for the moon, then go on.",
    )
    then = pick(
        rng,
        "walked on, step by step, until the path was steep and the air was thin",
        "crossed the bridge and climbed the hill while the clouds went by",
        "went along the river and sang so that nobody would be afraid",
    )
    return (
        f"{when} {name} found {thing} {where}. Then {other} came by and said: {speech} "
        f"So {name} thanked them and {then}."
    )


def _closing(hero: str, name: str) -> str:
    return (
        f"When the stars came out, {name} was home again, tired and glad. From that day on everyone "
        f"knew that a {hero} who helps others is never alone. The end."
    )
