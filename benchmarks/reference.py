"""The reference: a training step as the public tutorial script describes it, built from diffusers' own parts.

Every picture goes through VAE and CLIP in every step, weights in fp32 under autocast, default memory layout, no
compilation, the loss read in every step. The image branch is diffusers' IPAdapterAttnProcessor2_0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ipa.export.published import to_published
from ipa.model import IPAdapterModel
from ipa.types import Batch, to_unit_range


class ReferenceStep:
    """Takes the frozen parts of ``model`` for its own. Global head only, as in the script that it follows."""

    def __init__(self, model: IPAdapterModel, lr: float = 1e-4) -> None:
        self.family, self.encoder, self.unet = model.family, model.encoder, model.family.unet
        tensors = to_published(model.trainable.state_dict(), torch.float32)
        parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        self.unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
        trained = [p for name, p in self.unet.named_parameters() if "_ip." in name or name.startswith("encoder_hid")]
        for parameter in trained:
            parameter.requires_grad_(True)
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=1e-2)

    def __call__(self, batch: Batch, autocast: torch.dtype | None) -> float:
        """``autocast`` None stays in fp32."""
        with torch.autocast(self.unet.device.type, autocast, enabled=autocast is not None):
            loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        assert batch.image_B3HW is not None and batch.reference_B3HW is not None and batch.text_inputs is not None
        draws, family = batch.draws, self.family
        schedule = family.alphas_cumprod.to(self.unet.device)
        with torch.no_grad():
            posterior = family.vae.encode(to_unit_range(batch.image_B3HW)).latent_dist
            noise_BCHW = draws.posterior_noise_BCHW
            latents = (posterior.mean + posterior.std * noise_BCHW) * family.vae.config.scaling_factor
            t_B = (draws.time_B.double() * len(schedule)).long()
            alpha_B = schedule[t_B][:, None, None, None]
            noisy = alpha_B.sqrt() * latents + (1 - alpha_B).sqrt() * draws.noise_BCHW
            reference = (batch.reference_B3HW / 255 - self.encoder.mean) / self.encoder.std
            embeds = self.encoder.visual(reference)
            kept = [torch.zeros_like(e) if drop else e for e, drop in zip(embeds, draws.drop_image_B, strict=True)]
            ids_BL = batch.text_inputs["ids"]
            empty_L = family.prepare_text([""])["ids"][0].to(ids_BL.device)
            pairs = zip(ids_BL, draws.drop_text_B, strict=True)
            kept_BL = torch.stack([empty_L if drop else ids_L for ids_L, drop in pairs])
            text = family.text_condition(family.text_states({"ids": kept_BL}), batch.size_B6)
        added = {**(family.added_conditions(text) or {}), "image_embeds": [torch.stack(kept)[:, None]]}
        predicted = self.unet(noisy, t_B, text.states_BLD, added_cond_kwargs=added).sample
        if family.prediction_type == "v_prediction":
            target = alpha_B.sqrt() * draws.noise_BCHW - (1 - alpha_B).sqrt() * latents
        else:
            target = draws.noise_BCHW
        return F.mse_loss(predicted.float(), target.float())
