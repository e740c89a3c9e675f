"""Noise path and targets of diffusion training, as pure functions of tensors.

    x_t = α_t x_0 + σ_t ε,     α_t = √ᾱ_t,  σ_t = √(1 − ᾱ_t)
    ε-prediction:  target = ε                      (Ho et al. 2020)
    v-prediction:  target = α_t ε − σ_t x_0        (Salimans & Ho 2022)
    sample:        target = x_0

Rectified flow (Liu et al. 2022; Esser et al. 2024), σ from 0 (clean) to 1 (noise):

    x_σ = (1 − σ) x_0 + σ ε,     target = ε − x_0

Min-SNR-γ (Hang et al. 2023) weighs the error of x_0 by min(SNR, γ), SNR = α_t² / σ_t², whatever is predicted:

    ε: min(SNR, γ) / SNR      v: min(SNR, γ) / (SNR + 1)      sample: min(SNR, γ)

ᾱ_t and the kind of target are the checkpoint's own (its scheduler configuration).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ipa.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


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


def make_target(
    prediction_type: str, x0_BCHW: Tensor, noise_BCHW: Tensor, alphas_cumprod_S: Tensor, timestep_B: Tensor
) -> Tensor:
    """What the denoiser should say; raises UserError for a prediction type that is not one of PREDICTION_TYPES."""
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
    """What a loss mask m in [0, 1] (1: inside) does: cells outside count ``outside`` as much as those inside,

        L = mean[(m + w (1 − m)) (prediction − target)² + p (1 − m) (prediction − base)²],    w = ``outside``

    and with p = ``prior`` above 0 they are also drawn to the base's own prediction, without the image.
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
