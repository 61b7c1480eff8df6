"""Personal data found in a prompt, replaced before the prompt leaves the device, and put back into the answer.

Presidio's recognisers find e-mail addresses, phone numbers, cards, IBANs and IP addresses by their form and check what
can be checked: Luhn's digit, the remainder of an IBAN, the public suffix of a domain. They need neither a model nor the
network. Names, addresses of houses and all that only a language model would notice are not found: a redacted prompt is
a prompt without these five kinds, not an anonymous one.

Where Presidio as it comes falls short on the training prompts of `prompts`, recognisers derived from its own take over:

e-mail  the suffixes of domains are those that tldextract holds, where Presidio's asks the network first
card    Mastercard's numbers from 2221 to 2720 count as well
iban    in small letters as well
ip      not behind a word such as "version", and not `ada::add`, which has no digit
phone   of the regions US and GB only; seven digits and British mobile numbers by their form; none behind a word such as
        "order", and digits without any space or sign not behind any other word that is a label, as "locker"

A missed number is worse than a version or an order that is taken for one, since those come back with the answer: where
form and words leave it open, it is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

from edgelab.errors import EdgeLabError, to_install

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine, EntityRecognizer

Kind = Literal["email", "phone", "card", "iban", "ip"]
Policy = Literal["local", "redact", "cloud"]
Recognisers = Literal["edgelab", "presidio"]

NAMES: dict[str, Kind] = {
    "EMAIL_ADDRESS": "email",
    "PHONE_NUMBER": "phone",
    "CREDIT_CARD": "card",
    "IBAN_CODE": "iban",
    "IP_ADDRESS": "ip",
}  # Presidio's -> ours

_KINDS = "|".join(kind.upper() for kind in get_args(Kind))
_PLACEHOLDER = re.compile(
    rf"\[\s*({_KINDS})[\s\\_-]*([0-9]{{1,9}})\s*\]|(?<!\w)({_KINDS})\\?_([0-9]{{1,9}})(?!\w)",
    re.IGNORECASE | re.ASCII,
)


class PrivacyError(EdgeLabError):
    """A policy that does not exist, texts that do not belong together, or no recognisers."""


@dataclass(frozen=True)
class Entity:
    """Personal data in a text: characters `begin` to `end - 1`, which are `text`."""

    kind: Kind
    begin: int
    end: int
    text: str


@dataclass(frozen=True)
class Redacted:
    """A text with placeholders such as [EMAIL_1] in place of its entities, which are those of the text before.

    placeholders: one for each entity, in order; the same for the same entity.
    """

    text: str
    entities: tuple[Entity, ...] = ()
    placeholders: tuple[str, ...] = ()

    def restore(self, answer: str) -> str:
        """An answer with entities in place of their placeholders.

        A placeholder may come back in another case, with a space, a hyphen or nothing for the underscore, or without
        brackets if the underscore is there. What this text has no placeholder for is left as it is, and one that the
        answer drops is not missed. `restore(self.text)` is the text before, sign for sign.
        """
        known = {
            _mark(_PLACEHOLDER.fullmatch(placeholder)): entity.text
            for placeholder, entity in zip(self.placeholders, self.entities, strict=True)
        }
        return _PLACEHOLDER.sub(lambda match: known.get(_mark(match), match[0]), answer)


def _mark(match: re.Match[str]) -> tuple[str, int]:
    """Kind and number of a placeholder, however it is written."""
    return (match[1] or match[3]).upper(), int(match[2] or match[4])


def replaced(text: str, entities: Sequence[Entity]) -> Redacted:
    """A text with a placeholder for each entity; entities are in order and do not overlap.

    Numbers count from 1 in each kind and leave out those of anything that looks like a placeholder already.
    """
    bounds = [0, *(place for entity in entities for place in (entity.begin, entity.end)), len(text)]
    between = [text[begin:end] for begin, end in zip(bounds[::2], bounds[1::2], strict=True)]
    taken = {_mark(match) for piece in between for match in _PLACEHOLDER.finditer(piece)}
    given: dict[tuple[Kind, str], str] = {}
    for entity in entities:
        if (entity.kind, entity.text) not in given:
            word, number = entity.kind.upper(), 1
            while (word, number) in taken:
                number += 1
            taken.add((word, number))
            given[entity.kind, entity.text] = f"[{word}_{number}]"
    placeholders = tuple(given[entity.kind, entity.text] for entity in entities)
    pieces = [piece for pair in zip(between, (*placeholders, ""), strict=True) for piece in pair]
    return Redacted("".join(pieces), tuple(entities), placeholders)


def find(text: str, recognisers: Recognisers = "edgelab") -> list[Entity]:
    """Personal data in a text, in order and without overlap: of two that overlap the surer one, then the longer one.

    recognisers: "presidio" for its own as they come. Raises PrivacyError where presidio-analyzer is not installed.
    """
    found = analyzer(recognisers).analyze(text, "en", [*NAMES])
    chosen: list[Entity] = []
    for one in sorted(found, key=lambda one: (-one.score, one.start - one.end, one.start)):
        if all(one.end <= other.begin or other.end <= one.start for other in chosen):
            chosen.append(Entity(NAMES[one.entity_type], one.start, one.end, text[one.start : one.end]))
    return sorted(chosen, key=lambda entity: entity.begin)


def redact(text: str) -> Redacted:
    """A text with placeholders for the personal data that is found in it."""
    return replaced(text, find(text))


def outgoing(text: str, policy: Policy) -> Redacted | None:
    """What a policy sends to the cloud; None where the prompt stays on the device.

    local: prompts in which personal data is found stay. redact: placeholders go in its place. cloud: all is sent.
    """
    if policy not in get_args(Policy):
        raise PrivacyError(f"There is no policy {policy!r}; there are {', '.join(get_args(Policy))}.")
    if policy == "cloud":
        return Redacted(text)
    redacted = redact(text)
    return None if policy == "local" and redacted.entities else redacted


def leakage(sent: Sequence[str | None], labelled: Sequence[Sequence[Entity]]) -> float | None:
    """Entities that were sent / entities present, over prompts; None where there are none.

    sent: the text that left the device for each prompt, None or "" where nothing did. labelled: the personal data that
    is really in each. An entity counts as sent where the whole of it is in what was sent, in any case.
    """
    if len(sent) != len(labelled):
        raise PrivacyError(
            f"{len(sent)} texts were sent for {len(labelled)} labelled prompts; give one for each."
        )
    gone = [
        entity.text.casefold() in (text or "").casefold()
        for text, entities in zip(sent, labelled, strict=True)
        for entity in entities
    ]
    return sum(gone) / len(gone) if gone else None


@dataclass(frozen=True)
class Agreement:
    """Entities of one kind that were found as labelled (right), labelled only (missed) and found only (wrong)."""

    right: int = 0
    missed: int = 0
    wrong: int = 0

    @property
    def recall(self) -> float | None:
        return _share(self.right, self.missed)

    @property
    def precision(self) -> float | None:
        return _share(self.right, self.wrong)

    def recall_interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the recall."""
        return _wilson(self.right, self.missed)

    def precision_interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the precision."""
        return _wilson(self.right, self.wrong)


def agreement(
    labelled: Iterable[Iterable[Entity]], found: Iterable[Iterable[Entity]]
) -> dict[Kind, Agreement]:
    """How well what was found is what is labelled, by kind, over prompts. Only the exact characters count.

    The intervals take entities for independent; those of one template are not, so that they are too narrow.
    """
    counts = {kind: [0, 0, 0] for kind in get_args(Kind)}
    for one, other in zip(labelled, found, strict=True):
        present, seen = set(one), set(other)
        for place, entities in enumerate((present & seen, present - seen, seen - present)):
            for entity in entities:
                counts[entity.kind][place] += 1
    return {kind: Agreement(*each) for kind, each in counts.items()}


def _share(right: int, other: int) -> float | None:
    return right / (right + other) if right + other else None


def _wilson(right: int, other: int) -> tuple[float, float] | None:
    if not right + other:
        return None
    from scipy.stats import binomtest

    interval = binomtest(right, right + other).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def luhn_remainder(digits: str) -> int:
    """Luhn's sum modulo 10, 0 for the number of a card: every second digit from the right counts double. ISO 7812-1."""
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(map(int, digits[::-2])) + sum(doubled)) % 10


def iban_remainder(code: str) -> int:
    """An IBAN without spaces modulo 97, 1 if valid: its first four signs at the end, letters as 10 to 35. ISO 13616."""
    return int("".join(str(int(sign, 36)) for sign in code[4:] + code[:4])) % 97


SURE = 0.5  # score from which ours counts; Presidio's own counts from 0
LIKELY, UNLIKELY = 0.6, 0.2  # scores by the form or the words before
REACH = 6  # words before a number that are looked at, in its sentence
PHONE_WORDS = re.compile("phone|telephone|tel|cell|cellphone|mobile|calls?|called|reach|reached|text|fax|sms")
NO_PHONE_WORDS = re.compile(
    "orders?|parts?|codes?|isbn|references?|tickets?|versions?|release|invoices?|catalogue|catalog|items?|articles?|"
    "models?|products?|serial|sku|tracking|parcels?|shipments?|booking|meter"
)
IP_WORDS = re.compile("ip|ipv4|ipv6|address|server|printer|firewall|login|host|gateway|client|machine|at|on")
NO_IP_WORDS = re.compile(
    "versions?|releases?|builds?|firmware|drivers?|kernel|revision|patch|update|upgrade|app"
)
STRICT_GROUPING = 2  # digits in groups as in the plan of the region
PHONE_FORMS = {
    "British mobile": r"(?<![\w+])(?:\+44 ?|0)7\d{3} ?\d{3} ?\d{3}(?!\w)",
    "seven digits": r"(?<![\w.-])[2-9]\d{2}[-.]\d{4}(?![\w-]|\.\d)",
}
MASTERCARD = r"\b(?:222[1-9]|22[3-9]\d|2[3-6]\d{2}|27[01]\d|2720)[- ]?\d{4}[- ]?\d{4}[- ]?\d{4}\b"
SMALL_IBAN = r"(?<![A-Za-z0-9])([a-z]{2}\d{2}[a-z0-9]{11,30})(?![A-Za-z0-9])"


def said_before(text: str, begin: int, words: re.Pattern[str], against: re.Pattern[str]) -> bool | None:
    """Whether the nearest of these words in the sentence before a place is one of `words`; None without any."""
    sentence = re.split(r"[.!?]\s|\n", text[:begin])[-1]
    for word in reversed(re.findall(r"[^\W\d_]+", sentence.casefold())[-REACH:]):
        if words.fullmatch(word) or against.fullmatch(word):
            return against.fullmatch(word) is None
    return None


@cache
def analyzer(recognisers: Recognisers = "edgelab") -> AnalyzerEngine:
    """Presidio's engine on an empty spaCy pipeline, which downloads nothing. Built once: its import takes seconds."""
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
    except ImportError:
        raise PrivacyError(
            f"presidio-analyzer, which finds personal data, is not installed; `{to_install('hybrid')}` in the "
            "project's folder installs it."
        ) from None
    engine = SpacyNlpEngine()
    engine.nlp = {"en": spacy.blank("en")}
    found = _derived() if recognisers == "edgelab" else _as_they_come()
    return AnalyzerEngine(
        RecognizerRegistry(found), engine, default_score_threshold=SURE if recognisers == "edgelab" else 0
    )


def _email() -> EntityRecognizer:
    """Presidio's own with the suffixes that tldextract holds, so that it asks no network."""
    import tldextract
    from presidio_analyzer.predefined_recognizers import EmailRecognizer

    suffixes = tldextract.TLDExtract(cache_dir=None, suffix_list_urls=())

    class Offline(EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return suffixes(pattern_text).fqdn != ""

    return Offline()


def _as_they_come() -> list[EntityRecognizer]:
    from presidio_analyzer.predefined_recognizers import (
        CreditCardRecognizer,
        IbanRecognizer,
        IpRecognizer,
        PhoneRecognizer,
    )

    return [_email(), PhoneRecognizer(), CreditCardRecognizer(), IbanRecognizer(), IpRecognizer()]


def _derived() -> list[EntityRecognizer]:
    from presidio_analyzer import Pattern, PatternRecognizer, RecognizerResult
    from presidio_analyzer.predefined_recognizers import (
        CreditCardRecognizer,
        IbanRecognizer,
        IpRecognizer,
        PhoneRecognizer,
    )
    from spacy.lang.en.stop_words import STOP_WORDS

    class Judged:
        """Scores by the words before, and by the form where they say nothing. Presidio's own only ever raises them.

        Its words are compared with lemmas, too, and an empty pipeline has none.
        """

        words: re.Pattern[str]
        against: re.Pattern[str]

        def in_doubt(self, number: str, label: str) -> bool:
            """What counts where the words before say nothing. label: the word directly before, in small letters."""
            return True

        def enhance_using_context(
            self, text: str, raw_recognizer_results: list[RecognizerResult], *_: object, **__: object
        ) -> list[RecognizerResult]:
            for result in raw_recognizer_results:
                said = said_before(text, result.start, self.words, self.against)
                if said is None:
                    label = re.search(r"[^\W\d_]* ?$", text[: result.start].casefold())[0].strip()
                    said = self.in_doubt(text[result.start : result.end], label)
                result.score = LIKELY if said else UNLIKELY
            return raw_recognizer_results

    class Ip(Judged, IpRecognizer):
        words, against = IP_WORDS, NO_IP_WORDS

        def in_doubt(self, number: str, label: str) -> bool:
            return any(sign.isdigit() for sign in number)

    class Phone(Judged, PhoneRecognizer):
        words, against = PHONE_WORDS, NO_PHONE_WORDS

        def in_doubt(self, number: str, label: str) -> bool:
            return not re.fullmatch(r"[1-9]\d+", number) or label in ("", "number") or label in STOP_WORDS

        def analyze(self, text: str, *arguments: object, **more: object) -> list[RecognizerResult]:
            found = super().analyze(text, *arguments, **more)
            for result in found:
                number = text[result.start : result.end]
                if number.startswith("(") and number.count("(") > number.count(")"):
                    result.start += 1  # the bracket closes behind the number
            return found

    class PhoneByForm(Judged, PatternRecognizer):
        words, against = PHONE_WORDS, NO_PHONE_WORDS

    numbers = [Pattern(name, form, LIKELY) for name, form in PHONE_FORMS.items()]
    cards = [*CreditCardRecognizer.PATTERNS, Pattern("Mastercard from 2221 to 2720", MASTERCARD, 0.3)]
    return [
        _email(),
        Phone(supported_regions=("US", "GB"), leniency=STRICT_GROUPING),
        PhoneByForm("PHONE_NUMBER", patterns=numbers),
        CreditCardRecognizer(patterns=cards),
        IbanRecognizer(),
        IbanRecognizer(patterns=[Pattern("small letters", SMALL_IBAN, SURE)]),
        Ip(),
    ]
