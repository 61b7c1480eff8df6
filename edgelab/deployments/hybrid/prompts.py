"""Short messages with made-up personal data, where it is labelled, and a question about each.

`python -m edgelab.deployments.hybrid.prompts` writes data/privacy/prompts.jsonl again, from the templates and words in
that folder and a seed.

The sentences of the held-out prompts are in no training prompt, while the values of both come from the same functions:
what is measured on them says how well recognisers meet new sentences, not new ways of writing a number. Sentences that
were held out once and have been looked at are training sentences now. A third of the prompts hold no personal data,
only what looks like it: cards that fail Luhn's check, IBANs with wrong check digits, versions behind a word that says
so, order numbers, dates, parts.

No value belongs to anybody. E-mail addresses are of example.com, example.net and example.org (RFC 2606); phone numbers
are 555-0100 to 555-0199 in North America and those that Ofcom reserves for drama in Britain; IP addresses are of the
ranges for documentation (RFC 5737, RFC 3849); cards begin as the numbers that payment firms publish for testing; IBANs
have valid check digits before banks of nines or of the letters EDGE. Names are drawn from two lists.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from edgelab.assets import data_dir
from edgelab.deployments.hybrid.privacy import Entity, Kind, iban_remainder, luhn_remainder
from edgelab.errors import EdgeLabError

Split = Literal["train", "held_out"]
Asks = Literal["other", "entity", "part"]

SEED = 12
DRAWS: dict[Split, int] = {"train": 4, "held_out": 15}  # prompts of each template
SPARE_WORDS = 12  # that an answer may have beside the right one


AMERICAN = (
    "({area}) 555-01{end}",
    "{area}-555-01{end}",
    "+1 {area} 555 01{end}",
    "+1-{area}-555-01{end}",
    "{area}.555.01{end}",
    "{area}55501{end}",
    "555-01{end}",
)
AREAS = ("202", "212", "303", "312", "415", "617")
BRITISH = (
    "07700 900{end}",
    "07700900{end}",
    "+44 7700 900{end}",
    "020 7946 0{end}",
    "+44 (0)20 7946 0{end}",
    "(0113) 496 0{end}",
    "0131 496 0{end}",
)
CARDS = ("411111", "424242", "400000", "555555", "510510", "222300", "601111", "378282")
ACCOUNTS = {  # how the rest of an IBAN is built: # is a digit
    "AT": "99999###########",
    "BE": "999#########",
    "CH": "99999############",
    "DE": "99999999##########",
    "ES": "9999################",
    "FR": "99999##################",
    "GB": "EDGE99############",
    "IE": "EDGE99############",
    "IT": "X99999#################",
    "NL": "EDGE##########",
}


# Without one, small models begin a new line, or go on with the message, in place of an answer.
EXAMPLE = "My train to Lund leaves at nine.\nQuestion: Which city does the train go to?\nAnswer: Lund\n\n"


class PromptError(EdgeLabError):
    """A template with a field that nothing fills, or a split that does not exist."""


@dataclass(frozen=True)
class Prompt:
    """A message and a question about it. template: its name; templates of different splits share no sentence.

    entities: the personal data in the text, in order. answer: as in the text, or a part of an entity. asks: about
    another thing than an entity, for an entity itself, which the cloud can only name by its placeholder, or for a part
    of one, such as the last digits of a card, which nobody can tell from a placeholder.
    """

    split: Split
    template: str
    text: str
    question: str
    answer: str
    asks: Asks
    entities: tuple[Entity, ...] = ()

    def asked(self, text: str | None = None) -> str:
        """What a language model goes on from, with EXAMPLE first. text: in place of the message, where redacted."""
        return f"{EXAMPLE}{self.text if text is None else text}\nQuestion: {self.question}\nAnswer:"


def load(split: Split) -> list[Prompt]:
    """The prompts of a split of data/privacy/prompts.jsonl. Raises PromptError where there is no such split."""
    if split not in DRAWS:
        raise PromptError(f"The prompts have no split {split!r}; there are {', '.join(DRAWS)}.")
    lines = (data_dir() / "privacy" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [_from_record(record) for record in map(json.loads, lines) if record["split"] == split]


def is_right(answer: str, item: Prompt) -> bool:
    """Whether the first line of an answer holds the right one, as whole words, among few others.

    Case, punctuation and the spaces in numbers do not count; in e-mail and IP addresses all signs but case do. A line
    of more than SPARE_WORDS words beside the answer is wrong, so that nothing is gained by repeating the message, and
    so is one that names a whole entity where a part of it is asked for.
    """
    lines = [line for line in answer.splitlines() if line.strip()]
    if not lines or len(lines[0].split()) > len(item.answer.split()) + SPARE_WORDS:
        return False
    if item.asks == "part" and any(_named(one.text, one.kind, lines[0]) for one in item.entities):
        return False
    return _named(
        item.answer, next((one.kind for one in item.entities if one.text == item.answer), None), lines[0]
    )


def _named(sought: str, kind: Kind | None, line: str) -> bool:
    if kind in ("email", "ip"):
        pattern = re.escape(sought)
    elif kind:  # a number, which may be grouped otherwise
        pattern = r"[\s().\-]*".join(re.findall(r"\w", sought))
    else:
        pattern = r"\W+".join(re.findall(r"\w+", sought))
    return re.search(rf"(?<!\w){pattern}(?!\w)", line, re.IGNORECASE) is not None


def generated(split: Split, seed: int = SEED) -> list[Prompt]:
    """The prompts of a split, made from its templates: DRAWS of each."""
    draw = random.Random(f"{seed} {split}")
    return [
        filled(template, _Values(draw))
        for template in _templates()
        if template["split"] == split
        for _ in range(DRAWS[split])
    ]


def filled(template: dict[str, str], values: Callable[[str], str]) -> Prompt:
    """A prompt from a template with {fields}; `values` gives the text for each, the same whenever it is asked again."""
    text, entities = "", []
    for literal, field, _, _ in string.Formatter().parse(template["text"]):
        text += literal
        if field is None:
            continue
        value, kind = values(field), KINDS_OF.get(field.rstrip(string.digits))
        if kind:
            entities.append(Entity(kind, len(text), len(text) + len(value), value))
        text += value

    def finished(line: str) -> str:
        return "".join(
            literal + (values(field) if field else "")
            for literal, field, _, _ in string.Formatter().parse(line)
        )

    question, answer = finished(template["question"]), finished(template["answer"])
    return Prompt(
        template["split"], template["name"], text, question, answer, template["asks"], tuple(entities)
    )


class _Values:
    """The values of one prompt: drawn once for each field, and different for fields that a number tells apart."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.known: dict[str, str] = {}

    def __call__(self, field: str) -> str:
        if field not in self.known:
            if field in PARTS:
                whole, part = PARTS[field]
                return part(self(whole))
            make = MADE.get(field) or MADE.get(field.rstrip(string.digits))
            if make is None:
                raise PromptError(f"Nothing fills {{{field}}}; there are {', '.join([*MADE, *PARTS])}.")
            value = make(self.draw)
            while any(_alike(field, value, *other) for other in self.known.items()):
                value = make(self.draw)
            self.known[field] = value
        return self.known[field]


def _alike(field: str, value: str, other: str, its: str) -> bool:
    """Whether a value is that of another field, or of two entities one holds the other."""
    both = {field.rstrip(string.digits), other.rstrip(string.digits)} <= KINDS_OF.keys()
    return value == its or (both and (value in its or its in value))


@cache
def _words() -> dict[str, list[str]]:
    return json.loads((data_dir() / "privacy" / "words.json").read_text(encoding="utf-8"))


def _word(sort: str, draw: random.Random) -> str:
    return draw.choice(_words()[sort])


def _digits(draw: random.Random, count: int) -> str:
    return "".join(draw.choice(string.digits) for _ in range(count))


def _email(draw: random.Random) -> str:
    first, last = _word("first", draw), _word("last", draw)
    local = draw.choice(["{0}.{1}", "{0[0]}.{1}", "{0}_{1}", "{0}+shop", "{1}.{0}42", "{0}"])
    host = draw.choice(
        ["example.org", "example.com", "example.net", "mail.example.org", "eu.shop.example.com"]
    )
    address = f"{local.format(first, last)}@{host}"
    return address if draw.random() < 0.2 else address.lower()


def _phone(draw: random.Random) -> str:
    if draw.random() < 0.5:
        return draw.choice(AMERICAN).format(area=draw.choice(AREAS), end=_digits(draw, 2))
    return draw.choice(BRITISH).format(end=_digits(draw, 3))


def _card(draw: random.Random, valid: bool = True) -> str:
    first = draw.choice(CARDS)
    groups = (4, 6, 5) if first == "378282" else (4, 4, 4, 4)
    number = first + _digits(draw, sum(groups) - len(first) - 1)
    last = -luhn_remainder(number + "0") % 10
    number += str(last if valid else (last + draw.randint(1, 9)) % 10)
    return _grouped(number, groups, draw.choice(["", " ", " ", "-"]))


def _iban(draw: random.Random, valid: bool = True) -> str:
    country = draw.choice([*ACCOUNTS])
    rest = re.sub("#", lambda _: draw.choice(string.digits), ACCOUNTS[country])
    check = 98 - iban_remainder(f"{country}00{rest}")
    if not valid:
        check = 2 + (check - 2 + draw.randint(1, 96)) % 97  # check digits are 02 to 98
    code = f"{country}{check:02}{rest}"
    if draw.random() < 0.5:
        return _grouped(code, (4,) * 9, " ")
    return code if draw.random() < 0.8 else code.lower()


def _ip4(draw: random.Random) -> str:
    return f"{draw.choice(['192.0.2', '198.51.100', '203.0.113'])}.{draw.randint(1, 254)}"


def _ip(draw: random.Random) -> str:
    if draw.random() < 0.7:
        return _ip4(draw)
    parts = [f"{draw.randint(1, 0xFFFF):x}" for _ in range(6)]
    return draw.choice(["2001:db8::{0}", "2001:db8:{0}::{1}:{2}", "2001:db8:{0}:{1}:{2}:{3}:{4}:{5}"]).format(
        *parts
    )


def _grouped(text: str, groups: tuple[int, ...], between: str) -> str:
    pieces, begin = [], 0
    for size in groups:
        pieces.append(text[begin : begin + size])
        begin += size
    return between.join(piece for piece in pieces if piece)


def _serial(draw: random.Random) -> str:
    while True:
        number = _digits(draw, 16)
        if luhn_remainder(number):
            return f"SN-{_grouped(number, (4,) * 4, '-')}"


def _date(draw: random.Random) -> str:
    return f"{draw.randint(2019, 2027)}-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}"


def _time(draw: random.Random) -> str:
    return f"{draw.randint(0, 23):02}:{draw.randint(0, 59):02}"


def _version(draw: random.Random) -> str:
    return ".".join(str(draw.randint(0, top)) for top in (20, 40, 9, 250))


def _part(draw: random.Random) -> str:
    form = draw.choice(["###-###-####", "###-555-K##", "0800-###-##B", "####-####", "0## #### ###"])
    return re.sub("#", lambda _: draw.choice(string.digits), form)


def _order(draw: random.Random) -> str:
    form = draw.choice(["A-######", "20##-######", "SO/#####/#", "##########", "####-####-##"])
    return re.sub("#", lambda _: draw.choice(string.digits), form)


def _package(draw: random.Random) -> str:
    version = ".".join(str(draw.randint(0, top)) for top in (9, 40, 9))
    return f"{_word('thing', draw)}-tools@{version}"


KINDS_OF: dict[str, Kind] = {
    "email": "email",
    "phone": "phone",
    "card": "card",
    "iban": "iban",
    "ip": "ip",
}  # by field, without the number behind it
MADE: dict[str, Callable[[random.Random], str]] = {
    "email": _email,
    "phone": _phone,
    "card": _card,
    "iban": _iban,
    "ip4": _ip4,
    "ip": _ip,
    "no_card": lambda draw: _card(draw, valid=False),
    "no_iban": lambda draw: _iban(draw, valid=False),
    "name": lambda draw: f"{_word('first', draw)} {_word('last', draw)}",
    "city": lambda draw: _word("city", draw),
    "thing": lambda draw: _word("thing", draw),
    "colour": lambda draw: _word("colour", draw),
    "day": lambda draw: _word("day", draw),
    "count": lambda draw: str(draw.randint(2, 60)),
    "room": lambda draw: str(draw.randint(100, 599)),
    "price": lambda draw: f"{draw.randint(2, 400)}.{_digits(draw, 2)}",
    "date": _date,
    "time": _time,
    "stamp": lambda draw: f"{_date(draw)}T{_time(draw)}:{draw.randint(0, 59):02}.{_digits(draw, 3)}Z",
    "version": _version,
    "part": _part,
    "order": _order,
    "package": _package,
    "serial": _serial,
    "digits8": lambda draw: _digits(draw, 8),
    "digits10": lambda draw: _digits(draw, 10),
    "isbn": lambda draw: f"978-{_digits(draw, 1)}-{_digits(draw, 3)}-{_digits(draw, 5)}-{_digits(draw, 1)}",
    "gps": lambda draw: (
        f"{draw.randint(35, 60)}.{_digits(draw, 4)}, {draw.randint(1, 20)}.{_digits(draw, 4)}"
    ),
    "handle": lambda draw: (
        draw.choice(["@{0}", "@{0}_{1}", "{0}@reception", "{0} @ {1}"])
        .format(_word("first", draw), _word("last", draw))
        .lower()
    ),
    "flight": lambda draw: f"EX {_digits(draw, 4)}",
    "scope": lambda draw: draw.choice(["ada::add", "face::feed", "cafe::bed", "std::vector", "lib::decade"]),
}
PARTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "card_end": ("card", lambda card: card[-4:]),
    "phone_end": ("phone", lambda phone: phone[-3:]),
    "email_domain": ("email", lambda email: email.partition("@")[2]),
    "iban_country": ("iban", lambda iban: iban[:2]),
    "ip_first": ("ip4", lambda ip: ip.partition(".")[0]),
}  # answers that a placeholder hides


def _templates() -> list[dict[str, str]]:
    lines = (data_dir() / "privacy" / "templates.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _record(prompt: Prompt) -> dict[str, object]:
    entities = [[one.kind, one.begin, one.end] for one in prompt.entities]
    return {**vars(prompt), "entities": entities}


def _from_record(record: dict) -> Prompt:
    entities = tuple(
        Entity(kind, begin, end, record["text"][begin:end]) for kind, begin, end in record["entities"]
    )
    return Prompt(**{**record, "entities": entities})


def write(folder: Path | None = None) -> Path:
    """Write prompts.jsonl of both splits into `folder`, data/privacy by default; returns its path."""
    path = (folder or data_dir() / "privacy") / "prompts.jsonl"
    lines = [
        json.dumps(_record(prompt), ensure_ascii=False) for split in DRAWS for prompt in generated(split)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    write()
