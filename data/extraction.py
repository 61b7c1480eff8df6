"""Writes data/extraction.jsonl: messages with an order in them, and the order as JSON, labelled by construction.

python data/extraction.py

Nothing is taken from elsewhere: names, things and sentences are in this file, and a seed draws them. The sentences of
the test items, and a third of their names and things, are in no training item, so that a model has to read the message
rather than know it.
"""

import json
import random
from pathlib import Path

FIRST = [
    "Ada",
    "Ben",
    "Carla",
    "Dario",
    "Elif",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Leon",
    "Mira",
    "Nils",
    "Olga",
    "Pavel",
    "Ruth",
    "Samir",
    "Tara",
    "Udo",
    "Vera",
    "Wanda",
    "Xenia",
    "Yusuf",
    "Zoe",
    "Anton",
    "Berta",
    "Cem",
    "Dora",
    "Emil",
]
LAST = [
    "Abel",
    "Brandt",
    "Costa",
    "Duarte",
    "Ekman",
    "Fischer",
    "Garcia",
    "Haddad",
    "Ivanov",
    "Jansen",
    "Keller",
    "Lopez",
    "Meyer",
    "Novak",
    "Olsen",
    "Petrov",
    "Quinn",
    "Rossi",
    "Sato",
    "Torres",
    "Urban",
    "Vogel",
    "Weber",
    "Xu",
    "Yilmaz",
    "Zeman",
    "Alvarez",
    "Bianchi",
    "Cohen",
    "Dietz",
]
THINGS = [
    "lamp",
    "desk",
    "chair",
    "kettle",
    "carpet",
    "mirror",
    "clock",
    "shelf",
    "radio",
    "printer",
    "keyboard",
    "monitor",
    "bicycle",
    "helmet",
    "tent",
    "backpack",
    "blanket",
    "pillow",
    "teapot",
    "bowl",
    "candle",
    "ladder",
    "hammer",
    "drill",
    "bucket",
    "broom",
    "basket",
    "curtain",
    "sofa",
    "table",
]
COLOURS = ["red", "blue", "green", "black", "white", "yellow", "grey", "brown", "purple", "orange"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
TRAINING = (
    "Hello, this is {name}. I would like {count} {colour} {thing}s, please, by {day}.",
    "Please send {count} {colour} {thing}s to {name}. {day} is fine.",
    "{name} here. Could you deliver {count} {thing}s in {colour} on {day}?",
    "On {day} I need {count} {colour} {thing}s. Thank you, {name}",
    "Order for {name}: {count} {thing}s, colour {colour}, delivery on {day}.",
    "My name is {name} and I am writing about {count} {colour} {thing}s that I want on {day}.",
    "Good morning! We ran out of {thing}s. Bring {count} {colour} ones on {day}. Regards, {name}",
    "Can I get {count} {thing}s before {day}? They should be {colour}. Best, {name}",
    "For {day}, {name} wants {count} {thing}s, all of them {colour}.",
    "{count} {colour} {thing}s for {name}, to be picked up on {day}.",
    "Hi, {name} speaking, I changed my mind: make it {count} {colour} {thing}s, and not before {day}.",
    "Would {day} work for {count} {colour} {thing}s? Yours, {name}",
)
TEST = (
    "I am {name}, and I will come by on {day} to collect {count} {colour} {thing}s.",
    "Dear team, {count} {thing}s are missing here. Please bring them on {day}, in {colour}. {name}",
    "{name} asks for {count} {colour} {thing}s. The last day for this is {day}.",
    "We met on the phone, {name} is my name. Until {day} I can wait for the {count} {colour} {thing}s.",
)
ITEMS = {"training": 1200, "test": 120}
SEED = 15


def known(words: list[str], split: str) -> list[str]:
    """In training two thirds of the words, in the test all of them."""
    return words[: 2 * len(words) // 3] if split == "training" else words


def items(split: str, draw: random.Random) -> list[dict[str, str]]:
    """Different items of one split: a message and its answer, the order as one line of JSON."""
    found: dict[str, dict[str, str]] = {}
    while len(found) < ITEMS[split]:
        order = {
            "name": f"{draw.choice(known(FIRST, split))} {draw.choice(known(LAST, split))}",
            "count": draw.randint(2, 60),
            "item": draw.choice(known(THINGS, split)),
            "colour": draw.choice(COLOURS),
            "day": draw.choice(DAYS),
        }
        message = draw.choice(TRAINING if split == "training" else TEST).format(thing=order["item"], **order)
        found[message] = {"split": split, "message": message, "answer": json.dumps(order)}
    return list(found.values())


def main() -> None:
    draw = random.Random(SEED)
    lines = [json.dumps(item) for split in ITEMS for item in items(split, draw)]
    (Path(__file__).parent / "extraction.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
