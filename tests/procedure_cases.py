"""What tests of procedures share: their files, and runs that are stopped at a stage and started again."""

import json
from pathlib import Path

import pytest

from understudy import InputError, distill
from understudy.training import PipelineContext

ASKED = "asked:"


def lines(path):
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(recipe, says, asked="logs"):
    """A procedure is refused in one line.

    Args:
        asked: what its folder would have, had a model been asked or trained.
    """
    folder = Path(recipe["output"])
    with pytest.raises(InputError, match=says) as caught:
        distill(recipe)
    assert "\n" not in str(caught.value) and not (folder / asked).exists()
    (folder / "recipe.yaml").unlink(missing_ok=True)


def stopped_and_resumed(recipe, *cuts, also=None):
    """The result of a run that was interrupted at each of `cuts`, in their order, and started again behind each.

    Args:
        cuts: names of stages, when all of it is done but the writing; of inner runs, behind their end; or `asked:NAME`,
            behind the requests to a trained model whose name begins so.
        also: patches more for the interrupted runs, given a `MonkeyPatch`.
    """
    for cut in cuts:
        _stopped(recipe, cut, also)
    return distill(recipe)


def _stopped(recipe, cut, also):
    """Run `recipe` until it is interrupted at `cut`."""
    stage, train, told = PipelineContext.stage, PipelineContext.train, PipelineContext.ask_trained

    def staged(self, name, kind, make):
        def made(funnel):
            found = list(make(funnel))
            if self.prefix + name == cut:
                raise KeyboardInterrupt
            return found

        return stage(self, name, kind, made)

    def trained(self, name, values):
        found = train(self, name, values)
        if self.prefix + name == cut:
            raise KeyboardInterrupt
        return found

    def answered(self, source, requests, name):
        found = told(self, source, requests, name)
        if f"{ASKED}{name}".startswith(cut):
            raise KeyboardInterrupt
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PipelineContext, "stage", staged)
        patch.setattr(PipelineContext, "train", trained)
        patch.setattr(PipelineContext, "ask_trained", answered)
        if also is not None:
            also(patch)
        with pytest.raises(KeyboardInterrupt):
            distill(recipe)
