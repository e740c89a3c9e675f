"""Frozen modules: hashes, precisions and devices of their weights."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ipa.errors import UserError

HASHING_THREADS = 4
DTYPES = ("float32", "bfloat16", "float16")


class Frozen(nn.Module):
    """A module that is never trained and has no dropout."""

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode regardless of ``mode``."""
        return super().train(False)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def fingerprint(module: nn.Module) -> str:
    """Precision and hash of a frozen part, which show whether cached results can be reused."""
    return f"{dtype_name(next(module.parameters()).dtype)} {hash_weights(module)[:32]}"


def read_dtype(name: str, option: str) -> torch.dtype:
    """The dtype of frozen weights that torch calls ``name``; raises UserError naming ``option``."""
    if name not in DTYPES:
        raise UserError(f"{option}={name}: give float32, bfloat16 or float16")
    return getattr(torch, name)


def choose_device(name: str | None, rank: int = 0) -> str:
    """The device ``name``, by default a GPU if there is one; for ``cuda`` that of this ``rank``. Raises UserError."""
    device = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device == "cuda" and torch.cuda.is_available():
        return f"cuda:{rank % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        raise UserError(
            f"device={device}: torch finds {count} GPUs here ({str(error).splitlines()[0]}); give cpu, cuda, cuda:1 …, "
            "or null for a GPU if there is one"
        ) from error
    return device


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over the names and values of all weights and buffers, including buffers that no file stores."""
    tensors = sorted([*module.named_parameters(), *module.named_buffers()], key=lambda pair: pair[0])
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        digests = threads.map(hash_tensor, (tensor for _, tensor in tensors))
        whole = hashlib.sha256()
        for (name, _), digest in zip(tensors, digests, strict=True):
            whole.update(name.encode() + digest)
    return whole.hexdigest()


def hash_tensor(tensor: Tensor) -> bytes:
    """Of a tensor that is sharded across ranks, this rank's part; of a quantized tensor, its stored form."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    wrapper: Any = tensor
    if is_traceable_wrapper_subclass(wrapper):
        stored = [hash_tensor(getattr(wrapper, name)) for name in wrapper.__tensor_flatten__()[0]]
        return hashlib.sha256(b"".join(stored)).digest()
    numbers: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers).digest()
