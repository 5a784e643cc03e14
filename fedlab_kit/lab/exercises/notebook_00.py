"""Exercise of notebooks/00_start_here.ipynb."""

from __future__ import annotations

from typing import Any

from fedlab_kit.deployment.artifact import Artifact, compress
from fedlab_kit.experiment import Recipe
from fedlab_kit.lab.exercises import COURSE, Hint, exercise
from fedlab_kit.run import Run
from fedlab_kit.runs import train

SMALLER, LOSS = 3, 0.03  # at least so many times, at most so much accuracy


@exercise("00-1")
def a_third_of_the_file(answer: Any) -> str:
    """A recipe whose file is at most a third of the uncompressed one and loses at most three points of accuracy."""
    if not isinstance(answer, Recipe):
        raise Hint("Give a recipe: bench.recipe, or fk.Recipe(...) with the settings you chose.")
    run = train(COURSE.replace(model="half_mlp", teacher=COURSE))
    whole, small = compress(run, Recipe()), _file(run, answer)
    sizes = f"The file has {small.bytes:,} bytes, the uncompressed one {whole.bytes:,}"
    if answer.prune == "weight" and answer.dtype == "fp32" and answer.prune_ratio:
        raise Hint(f"{sizes}: a zero takes as much room as any other number.")
    if SMALLER * small.bytes > whole.bytes:
        raise Hint(f"{sizes}: that is more than a third. Which knob changes how many bits a weight takes?")
    if whole.accuracy - small.accuracy > LOSS:
        raise Hint(f"{sizes}: small enough, but it loses more than three points of accuracy. Take away less.")
    return f"{sizes}, and it loses at most three points of accuracy."


def _file(run: Run, recipe: Recipe) -> Artifact:
    try:
        return compress(run, recipe)
    except ValueError as error:
        raise Hint(f"That recipe cannot be used: {error}") from None
