import math
from itertools import product

import numpy as np
import pytest

from distill.evaluation.front import dominating


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_limits_choose(seed):
    generator = np.random.default_rng(seed)
    points = generator.integers(0, 5, size=(12, 3)).tolist()  # so few values that many are equal
    chosen = set()
    for most in product(range(5), repeat=2):  # every limit on the last two numbers
        within = [index for index, point in enumerate(points) if point[1] <= most[0] and point[2] <= most[1]]
        for order in ((0, 1, 2), (0, 2, 1)):
            best = min(([points[index][each] for each in order] for index in within), default=None)
            chosen |= {index for index in within if [points[index][each] for each in order] == best}
    assert [index for index, others in enumerate(dominating(points)) if not others] == sorted(chosen)


def test_who_dominates_whom():
    points = [(1, 1, 1), (1, 1, 1), (1, 2, 1), (0, 2, 1), (5, math.inf, 0), (math.nan, 0, 0)]
    assert dominating(points) == [[], [], [0, 1, 3], [], [], []]
    assert dominating([]) == []
    assert dominating([(2.0,), (1.0,)]) == [[1], []]
