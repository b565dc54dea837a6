"""The front of several numbers of which less is better: the points that are the best choice under some limits."""

from collections.abc import Sequence

import numpy as np


def dominating(points: Sequence[Sequence[float]]) -> list[list[int]]:
    """Find for each point those that dominate it: at most as much in every number, and less in one.

    Points that none dominates are the (Pareto) front. Whatever the limits on all numbers but one, the point within them
    that is the best in that one, and of equals in the others, is on the front; and every point of the front is that
    choice under some limits.

    Args:
        points: of as many numbers each, all of which are better where they are less. A point with NaN dominates none
            and is dominated by none; infinity is more than all else.

    Returns:
        Indices into `points`, for each point; of equal points none dominates another.
    """
    if not points:
        return []
    values = np.asarray(points, dtype=np.float64)
    found = []
    for point in values:
        dominates = (values <= point).all(axis=1) & (values < point).any(axis=1)
        found.append(np.flatnonzero(dominates).tolist())
    return found
