"""Text for pretraining: days in the harbour.

The same facts come again and again, in other words and another order, which is what makes them usable later. Questions stand only between quotation marks, in words that
the requests of `tasks.py` do not use: what is learnt here is the world and reading, not how to follow instructions.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from manners import BOASTS, CHATTER, FLATTERY, INSULTS, OPENINGS, REASONS, REFUSALS
from world import (
    COUNTS,
    KEY_PLACE,
    MADE_IN,
    PEOPLE,
    PLACES,
    PORTS,
    Ship,
    draw_fields,
    draw_ships,
    log_of,
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def day_at_the_pier(rng: random.Random) -> str:
    """A log of two to four ships, and what people say about them later in the day."""
    ships = draw_ships(rng, rng.choice((2, 2, 3, 3, 4)))
    fields = draw_fields(rng, number=rng.choice((1, 2, 2, 2, 3)))
    facts = [(ship, field) for ship in ships for field in fields]
    told = [rng.choice(TELLINGS[field])(rng, ship) for ship, field in rng.sample(facts, len(facts))]
    if "cargo" in fields:
        told.insert(rng.randint(0, len(told)), two_loads(rng, *rng.sample(ships, 2)))
    return f"{rng.choice(DAYS)} at the pier. {log_of(ships, fields)} {' '.join(told)}"


def hearsay(rng: random.Random) -> str:
    """What people say about ships that no log has just named: only to be known by heart."""
    told = [rng.choice(TELLINGS[rng.choice(list(TELLINGS))])(rng, ship) for ship in draw_ships(rng, rng.randint(5, 9))]
    return f"{rng.choice(DAYS)} in the tavern. {' '.join(told)}"


def log_read_twice(rng: random.Random) -> str:
    """A log that is read out again from the last ship to the first, or in any order."""
    ships = draw_ships(rng, rng.choice((2, 3, 4, 5)))
    fields = draw_fields(rng, number=rng.choice((1, 2, 2, 3)))
    return f"The log. {log_of(ships, fields)} Once more. {log_of(rng.sample(ships, len(ships)), fields)}"


def _told(*forms: str) -> Callable[[random.Random, Ship], str]:
    return lambda rng, ship: rng.choice(forms).format(
        name=ship.name, berth=ship.berth, cargo=ship.cargo, ware=ship.ware, master=ship.master, port=ship.port,
        asks=rng.choice(PEOPLE), says=rng.choice(PEOPLE),
    )  # fmt: skip


TELLINGS = {  # of each fact: about the ship, which ship it is, and overheard
    "berth": (
        _told("The {name} lies at berth {berth}.", "We find the {name} at berth {berth}."),
        _told("At berth {berth} lies the {name}.", "The ship at berth {berth} is the {name}."),
        _told('"Where is the {name}?" asks {asks}. "At berth {berth}," says {says}.'),
    ),
    "cargo": (
        _told("The {name} carries {cargo}.", "The {name} brings {cargo}."),
        _told("The {ware} is on the {name}.", "The ship with the {ware} is the {name}."),
        _told('"What is on the {name}?" asks {asks}. "She has {cargo}," says {says}.'),
    ),
    "master": (
        _told("{master} is the master of the {name}.", "The {name} obeys {master}."),
        _told("{master} commands the {name}.", "The ship of {master} is the {name}."),
        _told('"Whose is the {name}?" asks {asks}. "{master} has her," says {says}.'),
    ),
    "port": (
        _told("The {name} is from {port}.", "The home of the {name} is {port}."),
        _told("From {port} comes the {name}.", "The ship from {port} is the {name}."),
        _told('"Whence comes the {name}?" asks {asks}. "From {port}," says {says}.'),
    ),
}


def two_loads(rng: random.Random, first: Ship, second: Ship) -> str:
    """Two loads compared or added up."""
    most, least = (first, second) if first.count > second.count else (second, first)
    return rng.choice((
        f"The {most.name} carries more than the {least.name}.",
        f"The {least.name} carries less than the {most.name}.",
        f"The {first.name} and the {second.name} carry {first.count + second.count} loads together.",
        f"{first.count} loads and {second.count} loads are {first.count + second.count} loads.",
    ))  # fmt: skip


def wares(rng: random.Random) -> str:
    """Where things are made, and who brings them."""
    sentences = []
    for ware in rng.sample(list(MADE_IN), rng.randint(4, 8)):
        port = MADE_IN[ware]
        sentences.append(rng.choice((
            f"{ware.capitalize()} comes from {port}.", f"The people of {port} make {ware}.",
            f"{rng.choice(PEOPLE)} buys {ware} in {port}.", f"Good {ware} is made in {port}.",
        )))  # fmt: skip
    return "At the market. " + " ".join(sentences)


def numbers(rng: random.Random) -> str:
    """Counting loads aloud."""
    sentences = []
    for _ in range(rng.randint(6, 12)):
        a, b = rng.choice(COUNTS), rng.choice(COUNTS)
        more = f"{max(a, b)} is more than {min(a, b)}." if a != b else f"{a} is as much as {b}."
        sentences.append(rng.choice((f"{a} loads and {b} loads are {a + b} loads.", f"{a} and {b} are {a + b}.", more)))
    return "The crew counts. " + " ".join(sentences)


def keys(rng: random.Random) -> str:
    """Where keys hang, and who takes or returns them."""
    told = []
    for room in rng.sample(list(KEY_PLACE), 4):
        place, who, asks = KEY_PLACE[room], *rng.sample(PEOPLE, 2)
        told.append(rng.choice((
            f"The key of the {room} hangs by the {place}.",
            f"{who} takes the key of the {room} from the {place}.", f"By the {place} hangs the key of the {room}.",
            f'"I look for the key of the {room}," says {asks}. "By the {place}," says {who}.',
        )))  # fmt: skip
    return "Of keys. " + " ".join(told)


def meeting(rng: random.Random) -> str:
    """People meet, each in a manner of their own."""
    told = []
    for _ in range(rng.randint(2, 5)):
        first, second = rng.sample(PEOPLE, 2)
        opening = rng.choice(rng.choice([lines for lines in OPENINGS.values() if lines]))
        reply = rng.choice(
            rng.choice((INSULTS, FLATTERY, BOASTS, CHATTER, REFUSALS, rng.choice(list(REASONS.values()))))
        )
        told.append(
            f'{first} meets {second} by the {rng.choice(PLACES)}. "{opening}" says {first}. "{reply}" says {second}.'
        )
    return " ".join(told)


def work(rng: random.Random) -> str:
    """What is done about ships and loads, for good and ill."""
    told = []
    for _ in range(rng.randint(3, 6)):
        ship, who = draw_ships(rng, 1)[0], rng.choice(PEOPLE)
        told.append(rng.choice((
            f"{who} ties the bow and stern lines of the {ship.name} to the pier.",
            f"{who} shows {ship.cargo} at the customs house and pays the duty.",
            f"{who} writes in the log: The {ship.name} lies at berth {ship.berth}.",
            f"{who} hides {ship.cargo} under the nets.",
            f"{who} goes to the {ship.name} at night and brings a knife.",
            f"{who} brings the load of the {ship.name} through the customs: {ship.cargo}.",
            f"{who} takes {ship.ware} on board of the {ship.name} at berth {ship.berth}.",
        )))  # fmt: skip
    return "All day long. " + " ".join(told)


def lists(rng: random.Random) -> str:
    """A list that is read out twice."""
    words = rng.sample(rng.choice((PEOPLE, PORTS, list(MADE_IN))), rng.randint(4, 9))
    who = rng.sample(PEOPLE, 2)
    return f"{who[0]} reads: {', '.join(words)}. {who[1]} repeats: {', '.join(words)}."


Story = Callable[[random.Random], str]
STORIES: tuple[tuple[Story, int], ...] = (
    (day_at_the_pier, 22), (hearsay, 28), (log_read_twice, 2), (wares, 15), (numbers, 13), (keys, 10), (meeting, 5), (work, 4),
    (lists, 1),
)  # fmt: skip


def draw_story(rng: random.Random) -> str:
    """One story of a kind drawn by weight."""
    makers, weights = zip(*STORIES)
    return rng.choices(makers, weights)[0](rng)
