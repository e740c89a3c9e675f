"""Timestep sampling and weights of rectified flow are those of diffusers' training scripts and schedulers."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from ipa import objective
from ipa.families.flow import FlowTimes

COUNT = 5000
SCHEDULERS = {
    "flux": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    "sd3": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def uniform_draws(kind: str, mean: float = 0.0, std: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' draws, and the uniform numbers behind them in our direction, where larger means noisier."""
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling(kind, COUNT, mean, std, 1.29, generator=generator)
    generator.manual_seed(0)
    if kind == "logit_normal":
        return theirs, torch.special.ndtr(-torch.normal(0.0, 1.0, (COUNT,), generator=generator).double())
    drawn = torch.rand((COUNT,), generator=generator)
    return theirs, drawn if kind == "mode" else 1 - drawn


@pytest.mark.parametrize(
    ("kind", "mean", "std"), [("none", 0, 1), ("logit_normal", 0, 1), ("logit_normal", 0.5, 0.8), ("mode", 0, 1)]
)
def test_quantiles_are_those_of_diffusers(kind: str, mean: float, std: float) -> None:
    theirs, u_B = uniform_draws(kind, mean, std)
    quantile_B = objective.noise_quantile(u_B, kind.replace("none", "uniform"), mean, std)

    torch.testing.assert_close(1 - quantile_B, theirs.double(), rtol=0, atol=2e-6)
    order = u_B.argsort()
    assert (quantile_B[order].diff() >= 0).all()


@pytest.mark.parametrize("base", SCHEDULERS)
@pytest.mark.parametrize("kind", ["none", "logit_normal", "mode"])
def test_noise_levels_and_times_are_those_of_the_training_scripts(base: str, kind: str) -> None:
    """Theirs: index ⌊1000 u⌋ of the scheduler's tables; a draw on the border between two may fall on either side."""
    scheduler = SCHEDULERS[base]
    theirs, u_B = uniform_draws(kind)
    index_B = (theirs * 1000).long().clamp(max=999)
    sigma_B = FlowTimes(kind.replace("none", "uniform")).sigma(u_B, scheduler.sigmas, 1024)
    off = sigma_B != scheduler.sigmas[index_B]

    assert off.float().mean() < 0.002
    torch.testing.assert_close(sigma_B * 1000, scheduler.timesteps[index_B], rtol=0, atol=3.1)
    x0, noise = torch.randn(COUNT, 2), torch.randn(COUNT, 2)
    sigma = sigma_B[:, None]
    assert torch.equal(objective.flow_path(x0, noise, sigma_B)[0], (1 - sigma) * x0 + sigma * noise)


@pytest.mark.parametrize("kind", objective.WEIGHTINGS)
def test_weights_are_those_of_diffusers(kind: str) -> None:
    sigma_B = torch.linspace(0.001, 1, 100)
    torch.testing.assert_close(
        objective.flow_weight(sigma_B, kind), compute_loss_weighting_for_sd3(kind, sigma_B), rtol=1e-5, atol=0
    )


def test_the_resolution_shift_is_that_of_sampling() -> None:
    for tokens in (256, 1024, 4096):
        mu = calculate_shift(tokens)
        assert math.isclose(objective.resolution_shift(tokens), math.exp(mu))
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2], mu=mu)
        shifted = objective.shift_noise(torch.tensor([1.0, 0.6, 0.2]), objective.resolution_shift(tokens))
        torch.testing.assert_close(shifted, scheduler.sigmas[:3])
        sigma_B = FlowTimes(shift="resolution").sigma(torch.tensor([0.5995]), SCHEDULERS["flux"].sigmas, tokens)
        torch.testing.assert_close(sigma_B, scheduler.sigmas[1:2])
    u_B, (flux, sd3) = torch.rand(9), (each.sigmas for each in SCHEDULERS.values())
    torch.testing.assert_close(FlowTimes(shift=3.0).sigma(u_B, flux, 16), FlowTimes().sigma(u_B, sd3, 16))
