"""Where the stages of a recipe are kept, and what they say of themselves; known without loading any.

The first k techniques of a recipe give a stage, a variant too. Its address is made of its parent's address and of the
technique that changed it, so that two recipes with the same beginning share what that beginning cost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from edgelab import assets
from edgelab.errors import EdgeLabError
from edgelab.keys import key
from edgelab.recipes import Recipe, reads
from edgelab.storage import cache

if TYPE_CHECKING:
    from edgelab.reference import Source

FORMAT = 4  # of the folder
ABOUT = "variant.json"


class VariantError(EdgeLabError):
    """A variant that cannot be saved or read."""


def stage_keys(recipe: Recipe, source: Source, seed: int) -> list[str]:
    """The key of every stage of a recipe, the reference's own first.

    A key is made of the parent's key, the technique with its version, what it reads from outside, the seed, and FAST,
    which calibrates on less and trains shorter.
    """
    keys = [key("variant", FORMAT, source.sha)]
    for technique in recipe.techniques:
        text = Recipe((technique,)).weights
        made_of = [text, technique.version, *reads(technique), seed, assets.fast()]
        keys.append(key(keys[-1], made_of))
    return keys


def address(recipe: Recipe, source: Source, seed: int) -> Path:
    """The folder of a variant."""
    return cache.place("variants") / stage_keys(recipe, source, seed)[-1]


def is_whole(folder: Path) -> bool:
    """Whether a variant is there: its folder appears at once. An adapter needs what it stands on as well."""
    if not (folder / ABOUT).is_file():
        return False
    try:
        parent = parent_of(folder)
    except VariantError:  # a damaged one is there, and says so when it is read
        return True
    return parent is None or is_whole(parent)


def parent_of(folder: Path) -> Path | None:
    """The variant that an adapter stands on; None for a variant with weights of its own."""
    below = read_about(folder).get("adapter_of")
    return None if below is None else folder.parent / below


def kept_stages(recipe: Recipe) -> list[int]:
    """How many techniques each stage that is kept holds; the last is the whole recipe."""
    count = len(recipe.techniques)
    return [*(done for done in range(1, count) if recipe.techniques[done - 1].kept), count]


def read_about(folder: Path) -> dict:
    """What `variant.json` says. Raises VariantError for a folder that is no variant of this format."""
    try:
        about = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError):
        raise VariantError(f"{folder} holds no variant; measure its recipe to make it.") from None
    if about.get("format") != FORMAT:
        raise VariantError(
            f"{folder} is of format {about.get('format')}, not {FORMAT}; `edgelab cache clear` removes it."
        )
    return about
