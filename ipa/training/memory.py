"""The memory of a training step, estimated without any.

The real step runs on fake tensors, and the bytes of all storages that are alive are added up, in blocks of 512 bytes
as CUDA's allocator gives them. Norms compute in fp32 under autocast, as
they do on CUDA and not on the CPU. Left out are copies between contiguous norms and channels-last convolutions, the
workspaces of cuDNN and cuBLAS, and fragmentation: a card counts with ``RESERVE_GIB`` and ``FRAGMENTED`` less.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from ipa.model import IPAdapterModel
from ipa.types import Batch, Draws, Features, Posterior

GIB = 1 << 30
BLOCK = 512  # bytes
RESERVE_GIB, FRAGMENTED = 1.0, 0.05  # CUDA's context, a driver's desktop; share of what the allocator holds


class LiveMemory(TorchDispatchMode):
    """Bytes of all storages that operations inside have made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def hold(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.known[storage] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.release, size)
        return tensor

    def release(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self.hold, func(*args, **(kwargs or {})))


def estimate_peak(
    model: IPAdapterModel,
    make_step: Callable[[IPAdapterModel], Callable[[Batch], object]],
    batch: int,
    image_px: int,
    cached: bool = False,
    state_bytes: int = 8,
) -> int:
    """Peak bytes of a step with ``batch`` samples; ``model`` is on the meta device, and gets fake weights here.

    ``state_bytes`` is what the optimizer keeps of each trained weight, by default two moments in fp32.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model.to_empty(device="cpu")  # fake weights take no memory
    norms: Any = [each for each in model.modules() if type(each) in (nn.LayerNorm, nn.GroupNorm)]
    for norm in norms:
        norm.forward = partial(norm_as_on_cuda, norm)
    with fake, LiveMemory() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.hold(tensor)
        step = make_step(model)
        samples = make_batch(model, batch, image_px, cached)
        live.peak = live.now
        step(samples)
    return live.peak + state_bytes * sum(weight.numel() for weight in model.trained())


def norm_as_on_cuda(norm: nn.LayerNorm | nn.GroupNorm, states: Tensor) -> Tensor:
    """In fp32 under autocast: CUDA's list of such operations has norms, the CPU's has not."""
    parameters: list[Tensor | None] = [norm.weight, norm.bias]
    if torch.is_autocast_enabled("cpu"):
        states, parameters = states.float(), [each if each is None else each.float() for each in parameters]
    weight, bias = parameters
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(states, norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(states, norm.normalized_shape, weight, bias, norm.eps)


def make_batch(model: IPAdapterModel, batch: int, image_px: int, cached: bool, seed: int = 0) -> Batch:
    """Random samples on the model's device: pictures, or in their place what a feature cache holds of them."""
    draw = torch.Generator().manual_seed(seed)
    latents = (batch, *model.family.latent_shape(image_px))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    pixels = {
        name: torch.randint(256, (batch, 3, size_px, size_px), generator=draw, dtype=torch.uint8)
        for name, size_px in (("image_B3HW", image_px), ("reference_B3HW", model.encoder.image_size_px))
    }
    draws = Draws(
        posterior_noise_BCHW=normal(*latents),
        noise_BCHW=normal(*latents),
        time_B=torch.rand(batch, generator=draw),
        drop_text_B=torch.rand(batch, generator=draw) < 0.1,
        drop_image_B=torch.rand(batch, generator=draw) < 0.1,
    )
    rest: dict[str, Any] = cached_parts(model, normal, latents, batch) if cached else pixels
    if model.family.known_texts is None:
        texts = ["a picture of a thing"] * batch
        rest["text_inputs"] = model.family.prepare_text(texts)
    else:
        texts = [""] * batch
        rest["text_states"] = model.family.states_of(texts)
    return Batch(text=texts, draws=draws, **rest).to(model.device)


def cached_parts(model: IPAdapterModel, normal: Callable[..., Tensor], latents: Any, batch: int) -> dict[str, Any]:
    widths = model.encoder.widths
    features = {
        "pooled": lambda: Features(pooled_BE=normal(batch, widths.pooled).half()),
        "patches": lambda: Features(patches_BPF=normal(batch, widths.num_patches, widths.patch).half()),
    }
    posterior = Posterior(normal(*latents), normal(*latents) - 5).map(Tensor.half)
    return {"posterior": posterior, "features": features[model.head.uses]()}
