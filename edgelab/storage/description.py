"""What a runtime has to know of a variant before any tensor is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from edgelab.model.marks import Marks
from edgelab.storage.kv_cache import CacheGrid


@dataclass(frozen=True)
class Description:
    """dtype: of what is not packed. matrices: how each packed layer is stored, by name. shapes: of the layers that
    the configuration does not give. config: what config.json says. adapter: the kind that stands beside the weights,
    lora or dora.
    """

    dtype: str
    matrices: dict[str, dict] = field(default_factory=dict)
    marks: Marks = Marks()
    shapes: dict[str, list[int]] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    adapter: str | None = None

    @property
    def layout(self) -> str:
        """The name of the architecture in transformers, such as llama."""
        return self.config.get("model_type", "")

    def how(self, name: str) -> dict:
        """How a layer is stored; a head that shares its matrix with the embedding is stored as that."""
        how = self.matrices[name]
        return self.matrices[how["same_as"]] | how if "same_as" in how else how

    def as_json(self) -> dict[str, object]:
        """What `variant.json` holds of it; the configuration has a file of its own."""
        return {
            "dtype": self.dtype,
            "matrices": self.matrices,
            "marks": asdict(self.marks),
            "shapes": self.shapes,
            "adapter": self.adapter,
        }


def from_json(about: dict, config: dict) -> Description:
    """The inverse of `as_json`. Raises KeyError with the name of what is missing."""
    marks = about["marks"]
    cache = CacheGrid(**marks["cache"]) if marks["cache"] else None
    marks = Marks(cache, marks["native"], marks.get("pruned", False))  # a variant of before has none
    return Description(
        about["dtype"], about["matrices"], marks, about["shapes"], config, about.get("adapter")
    )
