"""Noise path and targets against diffusers' own schedulers."""

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ipa.objective import (
    PREDICTION_TYPES,
    add_noise,
    alpha_sigma,
    make_target,
    replace_rows,
    squared_error,
    to_timesteps,
)

SCHEDULERS = [
    DDPMScheduler(**tiny.SCHEDULE),
    DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    DDIMScheduler(**tiny.SCHEDULE),
    DDIMScheduler(**tiny.SCHEDULE, rescale_betas_zero_snr=True),
]


@pytest.fixture
def x0_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)


TIMESTEPS = torch.tensor([0, 1, 250, 700, 998, 999])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_noise_path_and_targets_are_those_of_diffusers(scheduler, x0_and_noise) -> None:
    x0, noise = x0_and_noise
    bars = scheduler.alphas_cumprod

    torch.testing.assert_close(
        add_noise(x0, noise, bars, TIMESTEPS), scheduler.add_noise(x0, noise, TIMESTEPS), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        make_target("v_prediction", x0, noise, bars, TIMESTEPS),
        scheduler.get_velocity(x0, noise, TIMESTEPS),
        rtol=1e-6,
        atol=1e-6,
    )
    assert torch.equal(make_target("epsilon", x0, noise, bars, TIMESTEPS), noise)
    assert torch.equal(make_target("sample", x0, noise, bars, TIMESTEPS), x0)


def test_a_schedule_that_ends_without_signal(x0_and_noise) -> None:
    x0, noise = x0_and_noise
    bars = SCHEDULERS[3].alphas_cumprod
    last = torch.full((6,), 999)

    assert bars[-1] == 0
    assert torch.equal(add_noise(x0, noise, bars, last), noise)
    assert torch.equal(make_target("v_prediction", x0, noise, bars, last), -x0)


def test_alpha_and_sigma_are_on_the_unit_circle() -> None:
    alpha, sigma = alpha_sigma(SCHEDULERS[0].alphas_cumprod, TIMESTEPS)

    assert alpha.shape == sigma.shape == (6, 1, 1, 1)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(6, 1, 1, 1))


def test_an_unknown_prediction_type_is_named_with_what_is_possible(x0_and_noise) -> None:
    x0, noise = x0_and_noise
    with pytest.raises(ValueError, match=r"'flow'.*epsilon, v_prediction, sample"):
        make_target("flow", x0, noise, SCHEDULERS[0].alphas_cumprod, TIMESTEPS)
    assert PREDICTION_TYPES == ("epsilon", "v_prediction", "sample")


def test_timesteps_cover_the_schedule_evenly() -> None:
    times = (torch.arange(4000) + 0.5) / 4000

    assert to_timesteps(times, 1000).bincount().tolist() == [4] * 1000
    assert to_timesteps(torch.tensor([0.0, 1 - 2**-24]), 1000).tolist() == [0, 999]


def test_the_error_is_that_of_each_sample_and_in_fp32() -> None:
    prediction, target = torch.randn(2, 3, 4, 5, 5).to(torch.bfloat16).unbind(0)
    expected = torch.stack(
        [torch.nn.functional.mse_loss(p.float(), t.float()) for p, t in zip(prediction, target, strict=True)]
    )

    assert squared_error(prediction, target).dtype == torch.float32
    torch.testing.assert_close(squared_error(prediction, target), expected)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5)])
def test_only_the_marked_rows_are_replaced(shape: tuple[int, ...]) -> None:
    states, empty = torch.randn(shape), torch.randn(1, *shape[1:])
    out = replace_rows(states, torch.tensor([True, False, True]), empty)

    assert torch.equal(out, torch.stack([empty[0], states[1], empty[0]]))
