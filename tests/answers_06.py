"""Right and wrong answers to the challenge of notebook 06; test_exercises.py tries them."""

from functools import cache
from pathlib import Path

import fedlab_kit as fk
from fedlab_kit.lab.exercises import COURSE


class Late:
    """An answer that has to be trained: made when it is asked for, in the store of the test that asks."""

    def __init__(self, make):
        self.make = cache(make)


LOGISTIC = COURSE.replace(model="logistic")
CHEAP = LOGISTIC.replace(uplink="ternary", downlink="int4")
SKEWED = LOGISTIC.replace(alpha=0.1, strategy="fedavgm", server_momentum=0.5)
BARE = LOGISTIC.replace(rounds=1, lr=0.001)  # small, and of no use


def artifact(experiment, **recipe):
    return Late(lambda: fk.compress(fk.train(experiment), fk.Recipe(**recipe)))


def gone():
    """An artifact whose file has been taken away."""
    found = fk.compress(fk.train(BARE), fk.Recipe(dtype="fp16"))
    Path(found.path).unlink()
    return found


RIGHT = {
    "06-1": [artifact(LOGISTIC, dtype="int4"), artifact(LOGISTIC, dtype="int8", prune_ratio=0.5)],
    "06-2": [CHEAP, Late(lambda: fk.train(CHEAP))],
    "06-3": [SKEWED, SKEWED.replace(seed=9)],
}
WRONG = {
    "06-1": [
        (artifact(LOGISTIC), "Fewer bits for each weight come first"),
        (artifact(COURSE.replace(model="half_mlp"), dtype="int8"), "try every Model"),
        (artifact(LOGISTIC, dtype="int8"), "Now the prune ratio, or fewer bits still"),
        (artifact(BARE, dtype="int4"), "85.0 % are asked for"),
        (Late(gone), "cannot be measured again"),
        (fk.Recipe(dtype="int4"), "Hand in an artifact"),
        (5_274, "Hand in an artifact"),
    ],
    "06-2": [
        (LOGISTIC, "628,290 bytes a round (314,140 up, 314,150 down); at most 60,000. Most of it is the downlink"),
        (LOGISTIC.replace(downlink="int4"), "Most of it is the uplink: another uplink codec"),
        (CHEAP.replace(rounds=1, lr=0.001), "85.0 % are asked for"),
        (CHEAP.replace(clients_per_round=1), "clients_per_round is 10 here, not 1"),
        (CHEAP.replace(alpha=100.0), "alpha is 0.5 here, not 100.0"),
        (CHEAP.replace(start=LOGISTIC), "Begin with an untrained model"),
        (55_880, "Hand in a run or an experiment"),
    ],
    "06-3": [
        (SKEWED.replace(alpha=0.5), "alpha is 0.1 here, not 0.5"),
        (SKEWED.replace(rounds=1), "60.0 % are asked for"),
        (SKEWED.replace(rounds=50), "31.4 MB in both directions; the budget is 30 MB"),
        (LOGISTIC.replace(alpha=0.1, lr=0.02), "One good seed is luck"),
        ("fedavgm", "Hand in a run or an experiment"),
    ],
}
