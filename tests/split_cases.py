"""What every method has to pass: an update is the same however its batch is cut into micro-batches."""

import torch


def flat(module):
    """All parameters of a module as one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def ends_alike(trainer_of, splits=((12, 1), (4, 3), (1, 12)), atol=1e-6, done=lambda trainer: None):
    """Train with each of `splits`, and compare all that was trained; the student has moved.

    Args:
        trainer_of: from the size of a micro-batch and their number to a trainer.
        done: called with each trainer when it has ended.
    """
    ends = []
    for micro, accumulate in splits:
        trainer = trainer_of(micro, accumulate)
        before = flat(trainer.model.student)
        trainer.train()
        done(trainer)
        assert not torch.equal(flat(trainer.model.student), before)
        ends.append(flat(trainer.model))
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=0, atol=atol)
