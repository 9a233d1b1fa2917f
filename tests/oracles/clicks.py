"""The most that a reader of simulated clicks can know (NumPy float64, tiny worlds).

It enumerates every possible user.
"""

import functools
import itertools

import numpy as np

EARLY_BOTH_LATE = {
    3: (1, 1, 1),
    4: (2, 1, 1),
    5: (2, 1, 2),
    6: (2, 2, 2),
    7: (3, 2, 2),
    8: (3, 2, 3),
}
NONE, EARLY, BOTH, LATE = range(4)


@functools.cache
def users(clusters):
    """Returns {number of interests: all assignments of lives to clusters [A, clusters]}."""
    grid = np.array(list(itertools.product(range(4), repeat=clusters)), np.int8)
    counts = np.stack([(grid == life).sum(1) for life in (EARLY, BOTH, LATE)], 1)
    return {m: grid[(counts == lives).all(1)] for m, lives in EARLY_BOTH_LATE.items()}


def group_probabilities(world, visits):
    """Returns P(positive is of group) and P(negative is of group), both [clusters, styles].

    Args:
      world: has clusters, styles, browse, drift, explore and hard.
      visits: (cluster, style, whether in the first half) of every visit so far, in order.
    """
    clusters, styles, drift = world.clusters, world.styles, world.drift
    step = np.full((styles, styles), drift / (styles - 1))
    np.fill_diagonal(step, 1 - drift)

    # If a cluster is an interest: the chance of each visit's style, and of the style asked for.
    belief, visited, style_chance = np.full((clusters, styles), 1 / styles), set(), []
    for cluster, style, _ in visits:
        if cluster in visited:
            belief[cluster] = belief[cluster] @ step
        style_chance.append(belief[cluster, style])
        belief[cluster] = np.eye(styles)[style]
        visited.add(cluster)
    belief = belief @ step

    total, positive = 0.0, np.zeros((clusters, styles))
    for m, assignments in users(clusters).items():
        weight = np.full(len(assignments), 1 / 6 / len(assignments))
        for (cluster, _, first_half), chance in zip(visits, style_chance, strict=True):
            active = np.isin(assignments, (EARLY, BOTH) if first_half else (BOTH, LATE))
            interest = active[:, cluster] / active.sum(1) * (1 - world.browse) * chance
            browsed = (assignments[:, cluster] == NONE) * world.browse / (clusters - m) / styles
            weight *= interest + browsed
        early, rest = assignments == EARLY, (assignments == BOTH) | (assignments == LATE)
        asked = 0.5 * early / early.sum(1, keepdims=True) + 0.5 * rest / rest.sum(1, keepdims=True)
        positive += (weight[:, None, None] * asked[:, :, None] * belief).sum(0)
        total += weight.sum()
    positive = (1 - world.explore) * positive / total + world.explore / clusters / styles

    negative = np.zeros_like(positive)
    for (c, g), (nc, ng) in itertools.product(np.ndindex(clusters, styles), repeat=2):
        if nc == c and ng != g:
            negative[nc, ng] += positive[c, g] * world.hard / (styles - 1)
        if nc != c:
            negative[nc, ng] += positive[c, g] * (1 - world.hard) / (clusters - 1) / styles
    return positive, negative
