"""The exceptions of the package: one clear sentence, also inside a notebook."""

from collections.abc import Iterable

ON_PHONES = ("executorch", "litert")  # extras whose packages every process would import


class EdgeLabError(Exception):
    """Something the user can mend. The message is one sentence: what is wrong, and what would be right."""

    def _render_traceback_(self) -> list[str]:
        # IPython calls this instead of printing a page of traceback.
        return [f"{type(self).__name__}: {self}"]


def listed(names: Iterable[object]) -> str:
    """One or more names as words: a, b and c."""
    *others, last = map(str, names)
    return f"{', '.join(others)} and {last}" if others else last


def few(names: list[str]) -> str:
    """The first of some names, for a sentence."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def first_sentence(error: Exception) -> str:
    """The first sentence of what a library says, on one line."""
    if isinstance(error, KeyError) or not str(error).strip():
        return f"{type(error).__name__} {error}".strip()
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".:")


def to_install(extra: str) -> str:
    """The command that installs an extra, in the project's folder: the package index knows another edgelab."""
    return "make phone" if extra in ON_PHONES else f"pip install --editable '.[{extra}]'"
