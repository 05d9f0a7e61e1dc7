"""Test metrics of click prediction, in NumPy."""

import numpy as np
from numpy.typing import NDArray


def auc(scores: NDArray[np.floating], labels: NDArray[np.floating]) -> float:
    """Area under the ROC curve: how often a positive sample scores above a negative one, ties counting one half.

    ``scores`` and ``labels`` (0 or 1) are [N]. NaN when all labels are the same.
    """
    positive = labels > 0.5
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # Rank from 1; equal scores share the mean of their ranks.
    rank = np.cumsum(counts) - (counts - 1) / 2
    above = rank[inverse][positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def log_loss(logits: NDArray[np.floating], labels: NDArray[np.floating]) -> float:
    """Mean binary cross-entropy of ``logits`` [N] against ``labels`` [N] (0 or 1), in nats."""
    wide = logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, wide) - labels * wide))
