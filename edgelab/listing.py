"""What a recipe, an option or a plot can name, as rows: for `edgelab list`."""

from __future__ import annotations

import dataclasses
from typing import Any

from edgelab.errors import EdgeLabError


class ListingError(EdgeLabError):
    """Something that cannot be listed."""


def listing(what: str, model: str | None = None) -> list[dict[str, Any]]:
    """A row for each thing of a kind, such as techniques or devices: name, settings and what it is.

    model: as in `load`, with "runtimes" alone: which recipe runs where on this model, by its configuration. Raises
    ListingError for a model beside another kind, ReferenceError where there is no such model.
    """
    if model is not None and what != "runtimes":
        raise ListingError(f"{what} are the same for every model; leave the model out, or list runtimes.")
    if what == "runtimes":
        from edgelab.doctor import absent
        from edgelab.recipes import deployments
        from edgelab.runtimes import support

        here = {name: not absent(name) for name in deployments()}
        return [
            {"recipe": answer.recipe, "runtime": answer.runtime, "runs": answer.reason is None}
            | {"reason": answer.reason, "alike": answer.alike, "installed": here[answer.runtime]}
            for answer in support.table(model)
        ]
    if what == "protocols":
        from edgelab.measure import protocols

        return [dataclasses.asdict(one) for one in protocols.PROTOCOLS.values()]
    if what == "techniques":
        from edgelab import recipes

        return [
            {
                "technique": name,
                "settings": ",".join(f"{one.name}={one.default}" for one in method.settings),
                "what": method.what,
            }
            for name, method in sorted(recipes.catalogue().techniques.items())
        ]
    if what in ("measurements", "fields"):
        from edgelab.ledger import every_field
        from edgelab.measure import measurements

        known = measurements()
        if what == "measurements":
            return [
                {
                    "measurement": one.name,
                    "part": one.part,
                    "needs": one.needs,
                    "fields": ", ".join(one.fields),
                }
                for one in known.values()
            ]
        return [
            {
                "field": name,
                "group": one.group,
                "label": one.with_unit,
                "better": one.better,
                "meaning": one.meaning,
            }
            for name, one in every_field().items()
        ]
    if what == "corpora":
        from edgelab import corpora

        splits = [
            {"corpus": name, "split": split} for name, split in sorted([*corpora.SPLITS, *corpora.WRITTEN])
        ]
        return [*splits, *({"corpus": name, "split": "any (needs the network once)"} for name in corpora.HUB)]
    from edgelab import devices

    found = devices.models().values() if what == "models" else devices.catalogue()
    return [dataclasses.asdict(one) for one in found]
