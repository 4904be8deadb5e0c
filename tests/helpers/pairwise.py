"""Few cases of many: every value of one axis meets every value of any other, but not all of them at once."""

import itertools


def pairwise(*axes):
    """Tuples with one value of each axis such that any two values of two axes occur together in one of them.

    They are chosen one after the other, each for the most pairs that have not occurred, so that as many cases as the
    two longest axes have pairs, or a few more, stand for the product of all. Which they are depends on the lengths of
    the axes alone.
    """
    missing = {
        ((i, a), (j, b))
        for (i, first), (j, second) in itertools.combinations(enumerate(axes), 2)
        for a in range(len(first))
        for b in range(len(second))
    }
    candidates = {
        case: set(itertools.combinations(enumerate(case), 2)) for case in itertools.product(*map(range, map(len, axes)))
    }
    chosen = []
    while missing:
        case = max(candidates, key=lambda case: len(candidates[case] & missing))
        missing -= candidates[case]
        chosen.append(tuple(axis[place] for axis, place in zip(axes, case, strict=True)))
    return chosen
