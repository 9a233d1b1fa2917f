"""The rules of the synthetic evidence task and of its readers, in plain Python.

Every function treats one stream.
"""


def occurs(stream, evidence, span):
    """Tells whether the facts of `evidence` come in order, all within `span` neighbours."""
    for start in range(len(stream)):
        rest = iter(stream[start : start + span])
        if all(fact in rest for fact in evidence):  # `in` eats the iterator up to the fact
            return True
    return False


def most(stream, evidence, width):
    """Counts the most distinct facts of `evidence` in any `width` neighbours."""
    starts = range(max(len(stream) - width, 0) + 1)
    return max(len(set(stream[start : start + width]) & set(evidence)) for start in starts)


def answers(world, stream, query, width):
    """Returns the answer of each reader; of equally good answers the first."""
    half = stream[len(stream) // 2 :]
    every = [
        (most(stream, evidence, width), answer)
        for of_query in world
        for answer, evidence in enumerate(of_query)
    ]

    def best(part, width):
        counts = [most(part, evidence, width) for evidence in world[query]]
        return counts.index(max(counts))

    return {
        "oracle, bag of facts": best(stream, len(stream)),
        "oracle, bag in a window": best(stream, width),
        "oracle, last half only": best(half, width),
        "oracle, without the query": max(every, key=lambda pair: pair[0])[1],
    }
