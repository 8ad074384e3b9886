"""Which words does the grammar draw from?"""

import random
from typing import Final


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


ANIMALS: Final = _listed(
    "llama alpaca mule donkey horse goat sheep cat dog mouse fox wolf bear rabbit hare owl eagle "
    "condor crow duck goose hen frog turtle snake lizard fish whale crab spider ant bee lion tiger "
    "monkey elephant camel puma otter badger hedgehog squirrel penguin robot dragon"
)

#: Further things a story can be about.
HEROES: Final = _listed(
    "girl boy farmer baker sailor king queen wizard pilot doctor teacher river mountain tree star "
    "computer train boat knight child"
)

WORDS: Final = _listed(
    "apple bread water stone house garden window door table chair paper music summer winter spring "
    "autumn morning evening night cloud rain snow wind sun moon star sea lake river mountain hill "
    "road bridge village city market school letter book pencil basket blanket wool rope saddle load "
    "train boat wheel cart lamp candle fire smoke salt sugar honey cheese milk butter potato corn "
    "bean onion carrot cherry banana lemon orange green yellow red blue white black silver gold "
    "copper iron friend mother father sister brother baby king queen happy quiet clever brave small "
    "long short quick slow warm cold soft hard open close help hello world question answer number "
    "word story model engine worker node agent token stream queue slot python code test arriero"
)

NAMES: Final = _listed(
    "Ada Alan Alma Ana Ben Bob Alice Carla Carlos Clara Dana David Elena Emil Emma Eva Felix Grace "
    "Hugo Ida Inti Ivan Jack Jane John Juan Julia Kai Karl Lena Leo Lola Luis Luna Maria Marie "
    "Max Mia Nina Noah Nora Olga Omar Oscar Otto Pablo Paul Pia Rosa Ruth Sam Sara Sofia Sol Tara "
    "Tim Tom Uma Vera Wayra Yuri Zoe"
)

CITIES: Final = _listed(
    "Paris London Berlin Madrid Rome Lima Cusco Quito Bogota Tokyo Oslo Vienna Prague Lisbon Dublin "
    "Athens Cairo Delhi Boston Chicago Toronto Sydney Moscow Kyoto Milan Munich Hamburg Geneva "
    "Zurich Warsaw Bern Havana Seoul Dallas Denver Seattle"
)

_ONSETS: Final = _listed("b c d f g h j k l m n p r s t v w z br ch cl dr fl gr pl sh st tr")
_VOWELS: Final = _listed("a e i o u ai ea oo")
_CODAS: Final = ("", "", "", "", "n", "r", "s", "l", "t", "m", "ck")


def invented_word(rng: random.Random) -> str:
    """Return a word of one to three syllables that is (nearly always) in no list."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.randint(1, 3))
    )


def word(rng: random.Random) -> str:
    """Return any word, mostly a listed one."""
    if rng.random() < 0.35:
        return invented_word(rng)
    return rng.choice(rng.choice((WORDS, WORDS, ANIMALS, HEROES)))


def name(rng: random.Random) -> str:
    """Return a person's name, sometimes an invented one."""
    return invented_word(rng).capitalize() if rng.random() < 0.3 else rng.choice(NAMES)


def city(rng: random.Random) -> str:
    """Return a city's name, sometimes an invented one."""
    return invented_word(rng).capitalize() if rng.random() < 0.3 else rng.choice(CITIES)


def pick(rng: random.Random, *options: str) -> str:
    """Return one of `options`, the first mostly.

    The uneven weights keep the most likely continuation clearly ahead of the second, so that
    greedy output does not depend on rounding.
    """
    return rng.choices(options, weights=[4.0, *[1.0] * (len(options) - 1)])[0]
