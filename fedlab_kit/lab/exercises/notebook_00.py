"""Exercise of notebooks/00_start_here.ipynb."""

from __future__ import annotations

from typing import Any

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.rounds import rounds
from fedlab_kit.lab.exercises import Hint, exercise


@exercise("00-1")
def half_the_uplink(answer: Any) -> str:
    """An experiment whose clients send half as many bytes in all, with the model and the rounds as they were."""
    if not isinstance(answer, Experiment):
        raise Hint("Give an experiment: bench.experiment, or fk.Experiment(...) with the settings you chose.")
    usual = Experiment()
    if (answer.dataset, answer.model, answer.rounds) != (usual.dataset, usual.model, usual.rounds):
        raise Hint("Keep the data set, the model and the number of rounds: another setting halves the bytes too.")
    if answer.dropout or answer.parents:
        raise Hint("That changes who answers or what comes before: look for a setting that is sure to save bytes.")
    share = _uplink_of_a_round(answer) / _uplink_of_a_round(usual)
    if not 0.45 <= share <= 0.51:
        raise Hint(f"Your clients send {share:.2f} of the bytes. How many of them speak in one round?")
    return f"Your clients send {share:.2f} of the bytes. What it costs in accuracy is one Run away."


def _uplink_of_a_round(experiment: Experiment) -> int:
    try:
        return next(rounds(experiment)).uplink_bytes
    except ValueError as error:
        raise Hint(f"That experiment cannot be run: {error}") from None
