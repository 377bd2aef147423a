"""The harbour: its ships, wares, ports, keys, and the sentences that say one fact each.

Every fact is fixed: a model reads them all while it is pretrained, and is then asked about them. Everything else in this
folder is put together from these. No questions and no manners here (`tasks.py`, `manners.py`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SHIPS = _words(
    "Heron Gull Tern Osprey Curlew Plover Petrel Puffin Kestrel Swan Otter Dolphin Raven Falcon Star Comet Lantern "
    "Anchor Thistle Rose Lily Hazel Willow Clover"
)
PEOPLE = _words(
    "Anna Bram Carla Dirk Edda Finn Greta Henk Ilse Jonas Karin Lars Marta Nils Olga Peter Rosa Sven Tilda Ulrich Vera "
    "Wim Agnes Boris"
)
PORTS = _words(
    "Saltmere Norhaven Eastby Westwick Greyfell Longsand Highcliff Redmouth Stonebay Fairlea Whitley Deepwell"
)
WARES = (  # (container, ware); ware number i is made in port number i % 12
    ("sacks", "salt"), ("barrels", "tar"), ("bales", "wool"), ("jars", "honey"), ("chests", "tea"), ("crates", "glass"),
    ("sacks", "coal"), ("barrels", "fish"), ("bales", "cloth"), ("jars", "oil"), ("chests", "silver"), ("crates", "figs"),
    ("sacks", "flour"), ("barrels", "wine"), ("bales", "hemp"), ("jars", "olives"), ("chests", "spice"), ("crates", "soap"),
    ("sacks", "pepper"), ("barrels", "beer"), ("bales", "leather"), ("jars", "vinegar"), ("chests", "books"), ("crates", "apples"),
)  # fmt: skip
CONTAINER = {ware: container for container, ware in WARES}
MADE_IN = {ware: PORTS[number % len(PORTS)] for number, (_, ware) in enumerate(WARES)}
BERTHS = range(1, 13)
COUNTS = range(2, 13)
OPEN_ROOMS = ("net loft", "boat shed", "fish hall", "rope walk", "chapel", "tavern", "school", "mill")
LOCKED_ROOMS = ("strongroom", "powder store", "seal vault")  # their keys are nobody's business
PLACES = (
    "fountain", "old oak", "stone bridge", "pump", "bell tower", "market cross", "garden wall", "long bench", "flag pole",
)  # fmt: skip


@dataclass(frozen=True)
class Ship:
    """One ship and her facts."""

    name: str
    berth: int
    master: str
    count: int
    ware: str
    port: str

    @property
    def cargo(self) -> str:
        """Say, '6 crates of figs'."""
        return f"{self.count} {CONTAINER[self.ware]} of {self.ware}"

    def part(self, field: str) -> str:
        """One fact, as the log puts it."""
        match field:
            case "berth":
                return f"lies at berth {self.berth}"
            case "cargo":
                return f"carries {self.cargo}"
            case "master":
                return f"sails under {self.master}"
            case "port":
                return f"hails from {self.port}"
        raise ValueError(field)

    def sentence(self, fields: Sequence[str]) -> str:
        """One sentence with the named facts, in this order."""
        *first, last = [self.part(field) for field in fields]
        return f"The {self.name} {' and '.join([*([', '.join(first)] if first else []), last])}."


FIELDS = ("berth", "cargo", "master", "port")


def _register() -> dict[str, Ship]:
    """Every ship by name: a master and a ware of her own; two ships share each berth and each port."""
    rng = random.Random("register")
    masters, wares = rng.sample(PEOPLE, len(SHIPS)), rng.sample(list(CONTAINER), len(SHIPS))
    berths, ports = rng.sample([*BERTHS, *BERTHS], len(SHIPS)), rng.sample([*PORTS, *PORTS], len(SHIPS))
    return {
        name: Ship(name, berth, master, rng.choice(COUNTS), ware, port)
        for name, berth, master, ware, port in zip(SHIPS, berths, masters, wares, ports)
    }


REGISTER = _register()
KEY_PLACE = dict(zip((*OPEN_ROOMS, *LOCKED_ROOMS), random.Random("keys").choices(PLACES, k=11)))


def draw_ships(rng: random.Random, number: int) -> list[Ship]:
    """Different ships of the register."""
    return rng.sample(list(REGISTER.values()), number)


def draw_fields(rng: random.Random, *needed: str, number: int = 2) -> list[str]:
    """The needed fields and others up to the number, in any order."""
    others = [field for field in FIELDS if field not in needed]
    fields = [*needed, *rng.sample(others, number - len(needed))]
    return rng.sample(fields, len(fields))


def log_of(ships: Sequence[Ship], fields: Sequence[str]) -> str:
    """A sentence for each ship with the same facts in the same order."""
    return " ".join(ship.sentence(fields) for ship in ships)
