"""OWL: blocks whose scores have more outliers keep more of their weights (Yin et al. 2023, arXiv:2310.05175)."""

from __future__ import annotations

import torch
from torch import Tensor


def outlier_share(scores: Tensor, times: float) -> float:
    """Share of scores above `times` their mean. scores: |w| times the norm of its input, of all weights of a block."""
    return float((scores > times * scores.mean()).float().mean())


def layer_sparsities(shares: list[float], target: float, reach: float, weights: list[int]) -> list[float]:
    """The sparsity of each block: linear in its share of outliers, at most 2 * reach apart, with the target as mean.

    weights: how many each block has; the mean counts them. Where all shares are equal, all get the target.
    """
    found, counts = torch.tensor(shares, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    spread = found.max() - found.min()
    if spread == 0:
        return [target] * len(shares)
    kept = (found - found.min()) / spread * 2 * reach
    return (target - kept + (kept * counts).sum() / counts.sum()).tolist()
