"""The pages of docs/ that the registries write, recipes.md and fields.md, and the tables of engines.md and results.md.

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

import pandas as pd

from edgelab import ledger, recipes
from edgelab.lab.question import Settings
from edgelab.ledger import every_field
from edgelab.measure import measurements
from edgelab.notation import Method, Setting
from edgelab.rows import small_embedding
from edgelab.runtimes import support

DOCS = Path(__file__).resolve().parent
REMOVING = r"^(?:prune|lowrank)\."  # how the recipes of that family begin
ADAPTING = "stories"  # the text that the table of adapters is about
TYPES = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text", "recipe": "recipe"}
FAMILIES = {
    "quantize": "Quantization",
    "qat": "Quantization-aware training",
    "prune": "Pruning",
    "lowrank": "Low rank",
    "recover": "Recovery",
    "distill": "Distillation",
    "lora": "LoRA",
    "qlora": "LoRA over packed weights",
    "merge": "Merging an adapter",
    "native": "An engine's own quantizer",
}
GROUPS = {
    "identity": "What was measured",
    "quality": "Quality",
    "tasks": "Tasks",
    "size": "Size",
    "speed": "Speed",
    "plan": "Plan of a partition",
    "network": "Network",
    "requests": "Requests to edge and cloud",
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
nats. "Compares within" says which rows a value can be compared in: those of one model, protocol, text and tokens
(protocol), those that may have read the same text in other tokens (text), or those of one machine.
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


def technique_table() -> str:
    """What rounding costs and buys: recipes in PyTorch that have a quality, from many bytes to few."""
    known = _in_torch("ppl")
    known = known[~known.index.str.contains(rf"{REMOVING}|corpus={ADAPTING}")]
    known = small_embedding(known.reset_index()).set_index("recipe")
    known = known.assign(size=-known["weights_mb"].round()).sort_values(
        ["size", "ppl"], ascending=[True, False]
    )
    columns = {
        "perplexity": _numbers(known, "ppl", ".2f"),
        "ΔNLL to the baseline [95 %]": _with_ends(known, "delta_nll", "+.3f"),
        "last words": _numbers(known, "last_word", ".1%"),
        "story cloze": _numbers(known, "story_cloze", ".1%"),
        "MB": _numbers(known, "weights_mb", ".0f"),
        "bits per weight": _numbers(known, "bits_per_weight", ".2f"),
        "seconds": _numbers(known, "apply_s", ".0f"),
    }
    return _table(known.index, columns)


def removing_table() -> str:
    """What removing costs and buys, before and after training on: from the best quality to the worst."""
    known = _in_torch("bits_per_byte")
    known = known[known.index.str.contains(REMOVING) | (known.index == "none")].sort_values(
        "bits_per_byte", kind="stable"
    )
    columns = {
        "bits per byte": _numbers(known, "bits_per_byte", ".3f"),
        "difference to the baseline [95 %]": _with_ends(known, "delta_bits_per_byte", "+.3f"),
        "perplexity": _numbers(known, "ppl", ".2f"),
        "story cloze": _numbers(known, "story_cloze", ".1%"),
        "MB": _numbers(known, "weights_mb", ".0f"),
        "prefill ÷ eager float32": _numbers(known, "prefill_ratio", ".2f"),
        "decoding ÷ eager float32": _numbers(known, "decode_ratio", ".2f"),
        "tokens trained": _numbers(known, "train_tokens", ",.0f"),
    }
    return _table(known.index, columns)


def adapting_table() -> str:
    """What training for another text gives there and costs on the usual one: from the best to the worst there."""
    known, usual = _measured(ADAPTING), _measured()
    known = known[known["ppl"].notna()].sort_values("ppl", kind="stable")
    there = usual.reindex(known.index)
    known.loc[~known.index.str.contains(f"corpus={ADAPTING}"), "train_tokens"] = None
    columns = {
        f"perplexity on {ADAPTING}": _numbers(known, "ppl", ".2f"),
        f"ΔNLL on {ADAPTING} [95 %]": _with_ends(known, "delta_nll", "+.3f"),
        "ΔNLL on wiki [95 %]": _with_ends(there, "delta_nll", "+.3f"),
        "adapter, MB": _numbers(known, "adapter_mb", ".2f"),
        "MB": _numbers(known, "weights_mb", ".0f"),
        "tokens trained": _numbers(known, "train_tokens", ",.0f"),
        "seconds": _numbers(known, "apply_s", ".0f"),
    }
    return _table(known.index, columns)


def speed_table() -> str:
    """What engines buy: recipes that were timed, by engine."""
    known = _measured()
    known = known[known["tpot_ms_p50"].notna() & known["weights_mb"].notna()]
    known = known.sort_values(["runtime", "weights_mb"], ascending=[True, False], kind="stable")
    columns = {
        "perplexity": _numbers(known, "ppl", ".2f"),
        "MB": _numbers(known, "weights_mb", ".0f"),
        "decoding ÷ eager float32 [95 %]": _with_ends(known, "decode_ratio", ".2f"),
        "first token, ms": _numbers(known, "ttft_ms_p50", ".0f"),
        "peak RSS, MB": _numbers(known, "peak_rss_mb", ".0f"),
        "export, s": _numbers(known, "export_s", ".0f"),
    }
    return _table(known.index, columns)


def _in_torch(field: str) -> pd.DataFrame:
    """What was measured in PyTorch and has a value of the field."""
    known = _measured()
    return known[(known["runtime"] == "torch") & known[field].notna()]


def _measured(corpus: str = Settings.corpus) -> pd.DataFrame:
    """By recipe, the last value of each field in data/reference: on a text, two threads, over the usual prompt.

    Of several seeds it is the lowest one's.
    """
    rows = ledger.frame(ledger.reference(), "reference")
    usual = Settings()
    rows = rows[rows["corpus"].isna() | (rows["corpus"] == corpus)]
    rows = rows[rows["threads"].isna() | (rows["threads"] == usual.threads)]
    rows = rows[rows["prefill_tokens"].isna() | (rows["prefill_tokens"] == usual.prompt_tokens)]
    rows = rows[rows["status"] == "ok"].sort_values(
        ["seed", "started_at"], ascending=[False, True], kind="stable"
    )
    return rows.groupby("recipe").last()


def _numbers(rows: pd.DataFrame, name: str, form: str) -> list[str]:
    return ["" if pd.isna(value) else format(value, form) for value in rows[name]]


def _with_ends(rows: pd.DataFrame, name: str, form: str) -> list[str]:
    ends = zip(*(_numbers(rows, one, form) for one in (name, f"{name}_low", f"{name}_high")), strict=True)
    return [f"{value} [{low}, {high}]" if low else "–" for value, low, high in ends]


def _table(recipes: Iterable[str], columns: dict[str, list[str]]) -> str:
    """Recipes and what is known of them; a column that no row fills is left out."""
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    lines = [_row("recipe", *columns), _row("---", *["---:"] * len(columns))]
    lines += [_row(f"`{recipe}`", *cells) for recipe, *cells in zip(recipes, *columns.values(), strict=True)]
    return "\n".join(lines)


def filled(page: str, **tables: str) -> str:
    """A page of docs/ with each table between the marks of its name."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, table in tables.items():
        marks = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, after = text.partition(marks[0])
        *_, after = after.partition(marks[1])
        text = f"{before}{marks[0]}\n\n{table}\n\n{marks[1]}{after}"
    return text


def _row(*cells: object) -> str:
    texts = ("" if cell is None else str(cell).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(texts)} |"


def pages() -> dict[str, str]:
    """The text of each page by the name of its file."""
    return {
        "recipes.md": recipe_reference(),
        "fields.md": field_reference(),
        "engines.md": filled("engines.md", support=support.markdown(support.table()), speed=speed_table()),
        "results.md": filled(
            "results.md", techniques=technique_table(), removing=removing_table(), adapting=adapting_table()
        ),
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
