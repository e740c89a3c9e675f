"""Noise path and targets of diffusion training, as pure functions of tensors.

    x_t = α_t x_0 + σ_t ε,     α_t = √ᾱ_t,  σ_t = √(1 − ᾱ_t)
    ε-prediction:  target = ε                      (Ho et al. 2020)
    v-prediction:  target = α_t ε − σ_t x_0        (Salimans & Ho 2022)
    sample:        target = x_0

Rectified flow (Liu et al. 2022; Esser et al. 2024), σ from 0 (clean) to 1 (noise):

    x_σ = (1 − σ) x_0 + σ ε,     target = ε − x_0

How often each σ is trained (``noise_quantile``; Esser et al. 2024, section 3.1), with u uniform and z standard normal:

    uniform       q = u
    logit_normal  q = 1 / (1 + exp(m − s z))
    mode          q = u + a (cos²(π u / 2) − 1 + u), mirrored

A table of noise levels, or a resolution shift (``shift_noise``), then turns the quantile q into σ.

Min-SNR-γ (Hang et al. 2023) weights the error of x_0 by min(SNR, γ), SNR = α_t² / σ_t², for every prediction type:

    ε: min(SNR, γ) / SNR      v: min(SNR, γ) / (SNR + 1)      sample: min(SNR, γ)

ᾱ_t and the kind of target are the checkpoint's own (its scheduler configuration).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ipa.errors import UserError
from ipa.types import TextInputs

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEPS = ("uniform", "logit_normal", "mode")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


def to_timesteps(time_B: Tensor, num_timesteps: int) -> Tensor:
    """Uniform draws in [0, 1) → integer timesteps 0 … num_timesteps − 1, each equally likely."""
    return (time_B.double() * num_timesteps).long().clamp(max=num_timesteps - 1)


def alpha_sigma(alphas_cumprod_S: Tensor, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
    """α_t and σ_t of each sample, shaped to multiply latents (B × 1 × 1 × 1)."""
    alpha_bar = alphas_cumprod_S.to(timestep_B.device)[timestep_B][:, None, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def add_noise(x0_BCHW: Tensor, noise_BCHW: Tensor, alphas_cumprod_S: Tensor, timestep_B: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(alphas_cumprod_S, timestep_B)
    return alpha * x0_BCHW + sigma * noise_BCHW


def flow_path(x0: Tensor, noise: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor]:
    """x_σ and the velocity target of rectified flow, for latents of any shape."""
    sigma = sigma_B.view(-1, *[1] * (x0.ndim - 1))
    return (1 - sigma) * x0 + sigma * noise, noise - x0


def noise_quantile(u_B: Tensor, kind: str, mean: float = 0.0, std: float = 1.0, mode_scale: float = 1.29) -> Tensor:
    """Uniform draws in [0, 1) → where on the schedule to train, 0 (clean) … 1 (noise), increasing in ``u_B``.

    ``kind`` is one of TIMESTEPS. diffusers' ``compute_density_for_timestep_sampling`` draws 1 − q, since its tables of
    noise levels descend; ``mean`` moves towards clean images there, and here too.
    """
    u_B = u_B.double()
    if kind == "uniform":
        return u_B
    if kind == "logit_normal":
        return torch.sigmoid(std * torch.special.ndtri(u_B) - mean)
    assert kind == "mode", kind
    return u_B + mode_scale * (torch.cos(math.pi * u_B / 2).square() - 1 + u_B)


def flow_weight(sigma_B: Tensor, kind: str) -> Tensor:
    """weight_B of the squared error at σ > 0, as diffusers' ``compute_loss_weighting_for_sd3``."""
    sigma_B = sigma_B.double()
    if kind == "sigma_sqrt":
        return sigma_B.pow(-2).float()
    if kind == "cosmap":
        return (2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B.square()))).float()
    assert kind == "none", kind
    return torch.ones_like(sigma_B, dtype=torch.float32)


def shift_noise(sigma_B: Tensor, factor: float) -> Tensor:
    """σ′ = f σ / (1 + (f − 1) σ): more noise for f > 1, as larger images need (Esser et al. 2024, equation 23)."""
    return factor * sigma_B / (1 + (factor - 1) * sigma_B)


def resolution_shift(
    num_tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """The factor exp(μ) of ``shift_noise`` for an image of so many tokens, μ linear in them, as FLUX is sampled."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + (num_tokens - base_tokens) * slope)


def make_target(
    prediction_type: str, x0_BCHW: Tensor, noise_BCHW: Tensor, alphas_cumprod_S: Tensor, timestep_B: Tensor
) -> Tensor:
    """The denoiser's target; raises UserError for a prediction type other than PREDICTION_TYPES."""
    if prediction_type == "epsilon":
        return noise_BCHW
    if prediction_type == "sample":
        return x0_BCHW
    if prediction_type == "v_prediction":
        alpha, sigma = alpha_sigma(alphas_cumprod_S, timestep_B)
        return alpha * noise_BCHW - sigma * x0_BCHW
    raise UserError(
        f"the base's scheduler predicts {prediction_type!r}; this trainer knows {', '.join(PREDICTION_TYPES)}"
    )


def loss_weight(
    prediction_type: str, alphas_cumprod_S: Tensor, timestep_B: Tensor, gamma: float | None = None
) -> Tensor:
    """weight_B of min-SNR-γ; ones without ``gamma``. A step without signal (SNR = 0) takes the limit of its formula."""
    alpha_bar_B = alphas_cumprod_S.to(timestep_B.device)[timestep_B].double()
    if gamma is None:
        return torch.ones_like(alpha_bar_B, dtype=torch.float32)
    snr_B = alpha_bar_B / (1 - alpha_bar_B)
    weights = {
        "epsilon": torch.clamp(gamma / snr_B, max=1),
        "v_prediction": snr_B.clamp(max=gamma) / (snr_B + 1),
        "sample": snr_B.clamp(max=gamma),
    }
    return weights[prediction_type].float()


def squared_error(prediction_BCHW: Tensor, target_BCHW: Tensor, weight_BCHW: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, in fp32, each cell times its weight: error_B."""
    error_BCHW = (prediction_BCHW.float() - target_BCHW.float()).square()
    return (error_BCHW if weight_BCHW is None else weight_BCHW * error_BCHW).flatten(1).mean(1)


@dataclass(frozen=True)
class MaskedLoss:
    """The loss under a mask m in [0, 1] (1: inside); the weight of cells outside is w = ``outside``,

        L = mean[(m + w (1 − m)) (prediction − target)² + p (1 − m) (prediction − base)²].

    With p = ``prior`` above 0 these cells are also pulled towards the base's prediction without the image.
    """

    outside: float = 0.0
    prior: float = 0.0

    def error(self, inside: Tensor, prediction: Tensor, target: Tensor, base: Tensor | None = None) -> Tensor:
        """error_B for the mask ``inside``, of the prediction's shape, without the prior term if ``base`` is None."""
        outside = 1 - inside
        error_B = squared_error(prediction, target, inside + self.outside * outside)
        return error_B if base is None else error_B + self.prior * squared_error(prediction, base, outside)


def replace_rows(states: Tensor, drop_B: Tensor, replacement: Tensor) -> Tensor:
    """Rows marked in ``drop_B`` become ``replacement`` (one row, or as many as the batch)."""
    return torch.where(drop_B.view(-1, *[1] * (states.ndim - 1)), replacement.to(states.dtype), states)


def drop_rows(inputs: TextInputs, empty: TextInputs, drop_B: Tensor, device: torch.device) -> TextInputs:
    """The text inputs with those of the empty text in the rows marked in ``drop_B``."""
    drop_B = drop_B.to(device)
    return {name: replace_rows(value.to(device), drop_B, empty[name].to(device)) for name, value in inputs.items()}
