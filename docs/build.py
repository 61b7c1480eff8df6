"""The pages of docs/ that the registries write: recipes.md, fields.md, and the table of engines.md.

python docs/build.py            write them
python docs/build.py --check    fail where one of them is not what it would write
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from edgelab import recipes
from edgelab.ledger import every_field
from edgelab.measure import measurements
from edgelab.notation import Method, Setting
from edgelab.runtimes import support

DOCS = Path(__file__).resolve().parent
MARKS = "<!-- support -->", "<!-- /support -->"
TYPES = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text", "recipe": "recipe"}
FAMILIES = {
    "quantize": "Quantization",
    "qat": "Quantization-aware training",
    "native": "An engine's own quantizer",
}
GROUPS = {
    "identity": "What was measured",
    "quality": "Quality",
    "tasks": "Tasks",
    "size": "Size",
    "speed": "Speed",
    "cost": "Cost of making it",
    "energy": "Energy",
    "parity": "Parity gate",
    "provenance": "Where it comes from",
    "own": "Of further measurements",
}
RECIPES = """\
# Recipes

<!-- Written by docs/build.py from the registries. -->

A recipe is techniques in order, joined by ` + `, and after ` @ ` where the result runs: `torch` where nothing is named.
`none` is the reference as it is. Settings follow a colon, `key=value` with commas between; those at their default can
be left out, and their order does not matter. A text with a comma or another separator in it is written in quotes.

    quantize.awq:bits=3,scales_only=true + quantize.gptq:bits=3 @ llamacpp
"""
FIELDS = """\
# Fields of a row

<!-- Written by docs/build.py from the registries. -->

A row is flat, with units in the names of its fields, and null where nothing was measured. MB is 10^6 bytes, NLL is in
nats. "Compares within" says which rows a value can be compared in: those of one model, protocol and text, or
those of one machine.
"""
MEASUREMENTS = """\

## Which measurement fills which fields

`--only` names parts, joined by commas; `quality`, `speed` and `memory` are measured where it names none, and those
of the part `variant` always.

| measurement | part | needs | version | fields |
| --- | --- | --- | ---: | --- |
"""


def recipe_reference() -> str:
    """Every technique and deployment with its settings."""
    known, lines = recipes.catalogue(), [RECIPES.rstrip()]
    families = dict.fromkeys((*FAMILIES, *(name.partition(".")[0] for name in known.techniques)))
    for family in families:
        lines.append(f"\n## {FAMILIES.get(family, family.capitalize())}")
        for name, method in sorted(known.techniques.items()):
            if name.partition(".")[0] == family:
                lines += _described(name, method, recipes.techniques()[name])
    lines.append("\n## Where it runs")
    for name, method in known.deployments.items():
        lines += _described(f"@ {name}", method, recipes.deployments()[name])
    return "\n".join(lines).rstrip() + "\n"


def _described(title: str, method: Method, kind: type) -> Iterator[str]:
    yield f"\n### `{title}`\n"
    names = "|".join(one.name for one in method.settings)
    notes = [re.split(rf"\s(?:{names}):\s", method.what)[0] if names else method.what]
    if method.kept:
        notes.append("Calibrates or trains; the result is kept.")
    if method.packages:
        notes.append(f"Packages: {', '.join(method.packages)}.")
    yield " ".join(notes + _source(kind))
    if method.settings:
        yield "\n| setting | type | default | meaning |\n| --- | --- | --- | --- |"
        for one in method.settings:
            yield _row(f"`{one.name}`", _type(one), "" if one.default is None else one.default, one.meaning)


def _source(kind: type) -> list[str]:
    """A link to the file, for what belongs to the project."""
    file = Path(inspect.getsourcefile(kind)).resolve()
    if not file.is_relative_to(DOCS.parent):
        return []
    place = file.relative_to(DOCS.parent).as_posix()
    return [f"[{place}](../{place})"]


def _type(one: Setting) -> str:
    words = ", ".join(map(str, one.options)) if one.kind == "choice" else TYPES[one.kind]
    return f"{words}, or none" if one.optional else words


def field_reference() -> str:
    """Every field of a row by group, and the measurements that fill them."""
    lines = [FIELDS.rstrip()]
    for group, title in GROUPS.items():
        fields = {name: one for name, one in every_field().items() if one.group == group}
        if not fields:
            continue
        lines.append(f"\n## {title}\n")
        lines.append("| field | label | unit | better | compares within | meaning |")
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for name, one in fields.items():
            lines.append(_row(f"`{name}`", one.label, one.unit, one.better, one.within, one.meaning))
    lines.append(MEASUREMENTS.rstrip())
    for one in sorted(measurements().values(), key=lambda one: (one.part, one.name)):
        filled = ", ".join(f"`{name}`" for name in one.fields)
        lines.append(_row(f"`{one.name}`", one.part, one.needs, one.version, filled))
    return "\n".join(lines) + "\n"


def engine_table(text: str) -> str:
    """engines.md with the table of what runs where between its marks."""
    before, _, after = text.partition(MARKS[0])
    *_, after = after.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{support.markdown(support.table())}\n\n{MARKS[1]}{after}"


def _row(*cells: object) -> str:
    texts = ("" if cell is None else str(cell).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(texts)} |"


def pages() -> dict[str, str]:
    """The text of each page by the name of its file."""
    return {
        "recipes.md": recipe_reference(),
        "fields.md": field_reference(),
        "engines.md": engine_table((DOCS / "engines.md").read_text(encoding="utf-8")),
    }


def write(folder: Path = DOCS) -> None:
    """Write the pages, with what plugins have entered."""
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def stale() -> list[str]:
    """Pages in docs/ that are not what would be written."""
    return [name for name, text in pages().items() if not _is(DOCS / name, text)]


def _is(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text


def main(arguments: Iterable[str]) -> int:
    os.environ["EDGELAB_PLUGINS"] = os.pathsep  # names no file: these pages are the project's own
    if "--check" not in arguments:
        write()
        return 0
    if old := stale():
        sys.stderr.write(
            f"docs/{', docs/'.join(old)} would be written otherwise; run `python docs/build.py`.\n"
        )
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
