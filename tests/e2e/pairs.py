"""Combinations of features in which every pair of values occurs: a covering array, made greedily.

The algorithm is AETG's (Cohen, Dalal, Fredman and Patton, 1997), with the candidates of a row ranked by how many open
pairs they close. Knows nothing of what the features are.
"""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations

Value = tuple[str, str]
"""A feature and the name of one of its values."""
Pair = frozenset[Value]


def every_pair(features: Mapping[str, Sequence[str]]) -> set[Pair]:
    """Every two values of different features."""
    return {frozenset([(a, x), (b, y)]) for a, b in combinations(features, 2) for x in features[a] for y in features[b]}


def rows(features: Mapping[str, Sequence[str]], forbidden: Collection[Pair] = ()) -> Iterator[dict[str, str]]:
    """Rows, a value for each feature, which together hold every pair that is not forbidden and none that is.

    The first value of a feature must be allowed beside everything.
    """
    rng = random.Random(0)
    names = list(features)
    todo = every_pair(features) - set(forbidden)
    while todo:
        row = dict(min(todo, key=sorted))
        for name in sorted(names, key=lambda name: (name not in row, rng.random())):
            if name in row:
                continue
            legal = [
                value
                for value in features[name]
                if not any(frozenset([(name, value), given]) in forbidden for given in row.items())
            ]
            row[name] = max(legal, key=lambda value: (_closed(name, value, row, todo), rng.random()))
        todo -= set(map(frozenset, combinations(row.items(), 2)))
        yield {name: row[name] for name in names}


def _closed(name: str, value: str, row: Mapping[str, str], todo: set[Pair]) -> int:
    return sum(frozenset([(name, value), given]) in todo for given in row.items())
