"""Allocation: what each layer gets, so that a budget costs the least quality. Bits, sparsities and ranks share it.

choice = argmin sum_l cost[l, choice_l]   such that   sum_l amount[l, choice_l] <= budget      (an integer programme)

cost: nats per token that a candidate of a layer costs, as `sensitivity` measures or predicts it. amount: what it takes
of the budget, which are bytes, or numbers that stay.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from edgelab import assets
from edgelab.recipes import Context, RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

LARGEST_COST = 1e6  # what costs are scaled to, far above the absolute gap at which the solver stops


class AllocationError(RecipeError):
    """A budget that no choice fits."""


def allocate(cost: np.ndarray, amounts: np.ndarray, budget: float, unit: str = "bytes") -> np.ndarray:
    """The candidate of each layer that makes the sum of costs least while the sum of amounts is at most `budget`.

    cost, amounts: (layers, candidates); amounts are whole numbers of `unit`. Returns the index of a candidate for each
    layer, (layers,). Exact: a multiple-choice knapsack as an integer programme with one binary variable per layer and
    candidate, solved by branch and bound. Raises AllocationError where even the smallest candidates take more than the
    budget, or where a cost is no finite number.
    """
    layers, candidates = cost.shape
    smallest = amounts.min(1).sum()
    if smallest > budget:
        raise AllocationError(
            f"A budget of {budget:,.0f} {unit} is too small; the layers need {smallest:,.0f}."
        )
    if not np.isfinite(cost).all():
        raise AllocationError("The sensitivity of a layer is no finite number; calibrate on another text.")
    step = np.gcd.reduce(amounts.astype(np.int64), axis=None)  # small numbers, for the solver's tolerances
    cost = cost - cost.min(1, keepdims=True)
    scale = LARGEST_COST / (cost.max() or 1)
    one_each = sparse.kron(sparse.eye_array(layers), np.ones((1, candidates)))
    solution = milp(
        (cost * scale).ravel(),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, np.inf),  # a second one would only cost
            LinearConstraint(amounts.reshape(1, -1) / step, ub=np.floor(budget / step)),
        ],
        options={"mip_rel_gap": 0},
    )
    if solution.x is None:
        raise AllocationError(f"No allocation was found: {solution.message}")
    return solution.x.reshape(cost.shape).argmax(1)


@dataclass(frozen=True)
class CostTable(ABC):
    """What each candidate of each layer costs; what the candidates are, a subclass says.

    shapes: (out_features, in_features) of each layer. cost: (layers, candidates), nats per token where that layer
    alone is changed. tokens: how many were looked at.
    """

    unit: ClassVar[str]  # of amounts

    names: list[str]
    shapes: list[tuple[int, int]]
    cost: np.ndarray
    tokens: int

    @property
    @abstractmethod
    def amounts(self) -> np.ndarray:
        """(layers, candidates), in whole units."""

    def choose(self, budget: float) -> np.ndarray:
        """The best candidate of each layer, (layers,), within a budget."""
        return allocate(self.cost, self.amounts, budget, self.unit)

    def predicted(self, choice: np.ndarray) -> float:
        """Sum of the costs of a choice, (layers,): the predicted KL divergence in nats per token."""
        return float(self.cost[np.arange(len(choice)), choice].sum())

    def spend(self, budget: int, steps: np.ndarray) -> np.ndarray:
        """Amounts of each layer, (layers,), between its candidates, so that less than a step of the budget is left.

        steps: (layers,), by how much a layer can grow. It starts from the best choice; what that leaves goes to the
        layers that gain most for it.
        """
        amounts = self.amounts
        spent = np.take_along_axis(amounts, self.choose(budget)[:, None], 1)[:, 0]
        while True:
            following = np.where(amounts > spent[:, None], amounts, np.inf).min(1)
            room = np.minimum(following - spent, budget - spent.sum()) // steps * steps
            can = np.isfinite(following) & (room > 0)
            if not can.any():
                return spent
            gains = self.costs_at(spent) - self.costs_at(np.where(can, following, spent))
            best = np.where(can, gains / np.where(can, following - spent, 1), -np.inf).argmax()
            spent[best] += int(room[best])

    def costs_at(self, amounts: np.ndarray) -> np.ndarray:
        """Costs of amounts between candidates, (layers,), on the straight line between its neighbours."""
        order = self.amounts.argsort(1, kind="stable")
        known, cost = (np.take_along_axis(each, order, 1) for each in (self.amounts, self.cost))
        return np.array([np.interp(*one) for one in zip(amounts, known, cost, strict=True)])

    def places(self) -> pd.DataFrame:
        """A row per layer: name, block, kind."""
        return pd.DataFrame(
            {
                "name": self.names,
                "block": [
                    next(int(part) for part in name.split(".") if part.isdigit()) for name in self.names
                ],
                "kind": [name.rpartition(".")[2] for name in self.names],
            }
        )

    @classmethod
    def kept(
        cls,
        address: str,
        layers: dict[str, nn.Linear],
        tokens: int,
        measure: Callable[[], dict[str, list[float]]],
        context: Context,
        **candidates: list,
    ) -> Self:
        """The table of an address, read from disk where it was made before; else measured, and kept there.

        layers: in the order that the table shall have; those that `measure` gives no costs are left out. candidates:
        the fields of the subclass.
        """
        file = assets.home() / "sensitivity" / f"{address}.json"
        if file.is_file():
            context.record.notes.append("Sensitivities were read from an earlier run.")
            return cls.read(file)
        costs = measure()
        names = [name for name in layers if costs.get(name)]
        table = cls(
            names=names,
            shapes=[tuple(layers[name].weight.shape) for name in names],
            cost=np.array([costs[name] for name in names]),
            tokens=tokens,
            **candidates,
        )
        with assets.staged(file) as draft:
            draft.write_text(json.dumps(vars(table) | {"cost": table.cost.tolist()}))
        return table

    @classmethod
    def read(cls, file: Path) -> Self:
        """A table as `kept` has written it."""
        parts = json.loads(file.read_text())
        cost = np.array(parts.pop("cost"))
        pairs = {
            name: [tuple(one) if isinstance(one, list) else one for one in part]
            for name, part in parts.items()
            if isinstance(part, list)
        }
        return cls(**parts | pairs, cost=cost)
