"""The words, names and places that generated dialogues draw from."""

from __future__ import annotations

from pathlib import Path
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS = _words(
    """
    apple banana cherry grape lemon mango orange peach pear plum melon olive onion carrot pepper potato tomato bread
    butter cheese coffee sugar honey salt rice soup cake milk water tea juice egg bean corn nut berry cat dog horse
    sheep goat cow pig hen duck goose fox wolf bear lion tiger zebra camel rabbit mouse rat snake frog fish whale shark
    crab bird eagle owl crow swan bee ant fly spider worm tree leaf root branch flower rose tulip lily grass forest
    river lake sea ocean beach island mountain hill valley desert field garden farm road street bridge tower castle
    house door window roof wall floor room kitchen table chair bed lamp mirror clock carpet shelf box basket bag bottle
    cup plate bowl knife fork spoon pan oven book page paper pencil pen letter story poem song music piano violin drum
    guitar flute dance paint picture colour red green blue yellow white black brown silver gold purple pink grey summer
    winter spring autumn rain snow wind storm cloud sun moon star sky night morning evening day week month year hour
    minute king queen prince knight doctor nurse teacher pilot farmer baker sailor soldier writer singer artist driver
    engineer student friend brother sister mother father child baby man woman boy girl hand foot head eye ear nose mouth
    heart bone skin hair coat hat shoe shirt dress glove scarf belt ring coin key lock rope wheel engine train plane
    boat ship car bus bicycle truck rocket robot machine computer screen keyboard network server memory cache block
    token model layer vector matrix number word line circle square triangle cube point angle small large quick slow
    bright dark warm cold soft hard heavy light happy sad brave clever gentle quiet loud early late old young new strong
    weak sharp smooth sweet sour fresh dry wet clean empty full run walk jump swim climb sing read write draw build open
    close carry throw catch push pull find lose give take make break turn stop start wait listen speak think dream sleep
    wake eat drink cook wash
    """
)
#: Two thousand more words, common in technical prose, so that the skills reach beyond the first five hundred.
WIDER_WORDS = tuple(Path(__file__).with_name("wider_words.txt").read_text(encoding="utf-8").split())

FIRST_NAMES = _words(
    """
    Ada Alan Alice Amir Ana Anna Ben Carla Carlos Chen Clara Dana Daniel David Diego Elena Emma Eric Eva Felix Fatima
    Grace Hana Hugo Ida Igor Ines Ivan Jack James Jana John Julia Karl Kenji Laura Lea Leo Lena Lucas Lucy Maria Mark
    Marta Max Maya Mei Mia Mila Nadia Nina Noah Nora Olga Omar Oscar Paul Pedro Peter Priya Ravi Rosa Ruth Sam Sara
    Sofia Tara Theo Tim Tom Uma Vera Victor Wei Yuki Yusuf Zara Zoe
    """
)
LAST_NAMES = _words(
    """
    Adams Ali Baker Becker Brown Carter Castro Chen Cohen Costa Diaz Evans Fischer Fox Garcia Green Gupta Haas Hall
    Hansen Hughes Ito Jansen Jones Kim Klein Kovac Kumar Lang Larsen Lee Lopez Martin Meyer Miller Mori Moore Murphy
    Novak Okafor Olsen Park Patel Perez Popov Reed Rossi Santos Sato Schmidt Silva Singh Smith Stone Suzuki Tanaka
    Torres Turner Walker Wang Weber White Wolf Wood Wright Young Zhang
    """
)
CITIES = (
    *_words(
        """
        Amsterdam Athens Auckland Bangkok Barcelona Beijing Berlin Bogota Boston Brussels Budapest Cairo Chicago
        Copenhagen Dakar Delhi Dublin Edinburgh Geneva Hamburg Hanoi Havana Helsinki Istanbul Jakarta Kyoto Lagos Lima
        Lisbon London Lyon Madrid Manila Melbourne Miami Milan Montreal Moscow Mumbai Munich Nairobi Naples Osaka Oslo
        Paris Prague Quito Riga Rome Santiago Seattle Seoul Shanghai Singapore Sofia Stockholm Sydney Tallinn Tokyo
        Toronto Tunis Turin Valencia Vancouver Venice Vienna Vilnius Warsaw Zagreb Zurich
        """
    ),
    "New York", "San Francisco", "Los Angeles", "Buenos Aires", "Cape Town", "Hong Kong", "Mexico City", "Tel Aviv",
    "Rio de Janeiro", "Kuala Lumpur", "São Paulo", "Bogotá", "Kraków", "Málaga", "Reykjavík", "Düsseldorf",
)  # fmt: skip
JOBS = (
    "teacher", "nurse", "pilot", "baker", "engineer", "writer", "farmer", "lawyer", "painter", "plumber", "doctor",
    "chef",
    "librarian", "musician", "photographer", "electrician", "gardener", "architect", "driver", "designer",
)  # fmt: skip
ITEMS = (
    "notebooks", "lamps", "chairs", "pencils", "mugs", "tables", "bottles", "cables", "keyboards", "monitors",
    "backpacks",
    "candles", "towels", "shirts", "plates", "clocks", "batteries", "headphones", "posters", "umbrellas",
)  # fmt: skip
EVENTS = (
    "Dentist", "Team meeting", "Lunch with Ana", "Project review", "Yoga class", "Piano lesson", "Doctor appointment",
    "Budget meeting", "Birthday party", "Car service", "Book club", "Phone call with Omar", "Job interview", "Haircut",
    "Parents evening", "Swimming lesson", "Board meeting", "Code review", "Dinner with Leo", "Train to Berlin",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
CONDITIONS = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear", "stormy")

COUNTRIES = _words(
    """
    France Germany Italy Spain Japan China India Brazil Canada Mexico Egypt Kenya Norway Sweden Poland Portugal Greece
    Turkey Australia Austria Belgium Chile Cuba Denmark Finland Ghana Hungary Iceland Ireland Peru Russia Thailand
    Vietnam
    """
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are quire-tiny, a small language model.",
    "Answer the question.",
    "You are a concise assistant.",
    "You are a friendly assistant who answers in one line.",
)


def any_word(rng: Random) -> str:
    """Draw a word: mostly a common one, sometimes one of the wider list, sometimes one that nobody knows."""
    draw = rng.random()
    return rng.choice(WORDS) if draw < 0.6 else rng.choice(WIDER_WORDS) if draw < 0.9 else pseudo_word(rng)


def pseudo_word(rng: Random) -> str:
    """Make a word nobody knows, so that a skill is learned for letters and not only for known words."""
    return "".join(
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))
    ) + rng.choice(("", "n", "r", "s", "t", "l"))
