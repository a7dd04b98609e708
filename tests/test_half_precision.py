"""Losses of half-precision values are computed in float32: the same as of these values in float32."""

import pytest
import torch

from understudy.losses import diffusion, masked_diffusion, step_distillation
from understudy.losses import score_distillation as scores

LEVEL = torch.tensor([0.9, 0.5, 0.3])
ALPHAS = masked_diffusion.cosine_alphas(50)
LOSSES = {
    "noise_error": masked_diffusion.noise_error,
    "variance_error": lambda a, b: masked_diffusion.variance_error(a, b, b, a, torch.tensor([0, 7, 49]), ALPHAS),
    "squared_error": diffusion.squared_error,
    "denoising_loss": lambda a, b: diffusion.denoising_loss(a, b, LEVEL, 1 - LEVEL, "epsilon"),
    "bootstrapping": lambda a, b: diffusion.bootstrapping(a, b, LEVEL),
    "boundary": diffusion.boundary,
    "progressive": lambda a, b: step_distillation.progressive(a, b, LEVEL),
    "consistency": lambda a, b: step_distillation.consistency(a, b, "l1"),
    "score_distillation": scores.score_distillation,
    "score_difference": scores.score_difference,
    "distribution_matching": lambda a, b: scores.distribution_matching(a, b, a.flip(0)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_are_those_of_float32(name):
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 40).bfloat16()
    found, wanted = LOSSES[name](a, b), LOSSES[name](a.float(), b.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_the_preference_of_images_is_told_by_small_differences():
    """Two errors that differ by a thousandth are one number in bfloat16, and β of hundreds multiplies the difference."""
    predicted, noise = torch.zeros(2, 4, 64).bfloat16(), torch.ones(2, 4, 64)
    noise[1, 0, 0] = 1.5
    errors = masked_diffusion.image_errors(masked_diffusion.noise_error(predicted, noise), torch.ones(2, 4))
    assert 0.004 < float(errors[1] - errors[0]) < 0.006
