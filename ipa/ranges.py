"""The possible values of numbers and switches, for all commands: one table, checked before anything is loaded.

Imports only OmegaConf and the standard library, so that a wrong value is refused at once. What depends on other options
or on loaded models is checked where it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ipa.errors import UserError

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**32 - 1
MAX_BATCH = 2**20
MAX_PROCESSES = 1024
MAX_EDGE_PX = 16384
TRAINING_STEPS = 1000  # of the noise schedules; no sampler makes more
REPEATS = re.compile(r"\$\{[\w.]+\}")


@dataclass(frozen=True)
class Range:
    """``kind``: int, float or bool. Limits are inclusive, but for ``above`` and ``below``.

    With ``null`` the option may be None, with ``zero_is_null`` 0 means the same. ``words`` may be given in place of a
    number, and with ``lists`` a list, which is not looked into.
    """

    kind: type
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    null: bool = False
    zero_is_null: bool = False
    words: tuple[str, ...] = ()
    lists: bool = False

    def read(self, value: Any) -> Any:
        """The normalized value: 1e5 as an integer, None for a 0 that means none. Raises ValueError if out of range."""
        named = isinstance(value, str) and value in self.words
        if named or (value is None and self.null) or (self.lists and OmegaConf.is_list(value)):
            return value
        number = self.number(value)
        if self.zero_is_null and number == 0:
            return None
        if not self.contains(number):
            raise ValueError(value)
        return number

    def number(self, value: Any) -> Any:
        if self.kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        kinds = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            raise ValueError(value)
        return value

    def contains(self, value: Any) -> bool:
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """In words: "an integer at least 1 and at most 1024, or auto"."""
        name = {int: "an integer", float: "a number", bool: "true or false"}
        limits = " and ".join(
            f"{word} {value:.10g}"
            for word, value in (
                *(("at least", self.low), ("above", self.above)),
                *(("at most", self.high), ("below", self.below)),
            )
            if value is not None
        )
        nothing = ["null" if not self.zero_is_null else "0 or null for none"] if self.null else []
        others = [*self.words, *(["a list"] if self.lists else []), *nothing]
        return ", or ".join([f"{name[self.kind]}{' ' * bool(limits)}{limits}", *others])


def whole(low: int | None = None, high: int | None = MAX_COUNT, **options: Any) -> Range:
    return Range(int, low, high, **options)


def number(low: float | None = None, high: float | None = None, **options: Any) -> Range:
    return Range(float, low, high, **options)


FLAG = Range(bool)
STEPS = whole(0)  # an interval; 0: only at the last step
SHARE = number(0, 1)
POSITIVE = number(above=0)
EDGE_PX = whole(8, MAX_EDGE_PX, null=True)

# The first pattern that fits an option counts; options that none fits are checked where they are used.
RANGES: Mapping[str, Range] = {
    "*seed": whole(0, MAX_SEED),
    "min_snr_gamma": number(above=0, null=True, zero_is_null=True),
    "ema.decay": number(above=0, below=1, null=True, zero_is_null=True),
    **dict.fromkeys(("gradient_checkpointing", "compile", "profile", "dry_run", "generate"), FLAG),
    **dict.fromkeys(("base.channels_last", "base.t5", "trainer.enable_*"), FLAG),
    "base.text_tokens": whole(1, 4096, null=True),
    "base.time_width": whole(1, 65536, null=True),
    "base.*_guidance": number(0, 1000),
    "base.*_std": number(0, 100),
    "base.times.logit_mean": number(-100, 100),
    "base.times.logit_std": POSITIVE,
    "base.times.mode_scale": number(-1, 2),
    "base.times.shift": number(above=0, high=1000, words=("scheduler", "resolution")),
    "scale_warmup_steps": whole(0),
    "callbacks.scale_warmup.num_steps": whole(0),
    # sizes of a step
    **dict.fromkeys(("global_batch_size", "batch_size", "sampling.batch_size"), whole(1, MAX_BATCH)),
    **dict.fromkeys(("data.batch_size", "data.val_batch_size"), whole(1, MAX_BATCH, null=True)),
    "image_size_px": EDGE_PX,
    "num_workers": whole(0, MAX_PROCESSES, null=True),
    "workers": whole(1, MAX_PROCESSES, null=True),
    "data.num_workers": whole(0, MAX_PROCESSES),
    "data.lanes.*": whole(1, MAX_PROCESSES, null=True),
    "data.window": whole(1),
    "data.headroom": number(1, 8),
    "data.max_pixels": whole(1),
    "data.drops.*": SHARE,
    "loss_mask_*": number(0),
    "data.pairs.self": SHARE,
    "data.background.white": SHARE,
    "data.augment.area": number(above=0, high=1),
    "data.augment.*": SHARE,
    "data.known.*.weight": POSITIVE,
    # what is trained
    "optimizer.lr": number(above=0, high=1e6),
    "lr_factor": number(above=0, high=1e6),
    "optimizer.weight_decay": number(0, 100),
    "optimizer.eps": POSITIVE,
    "optimizer.fused": Range(bool, null=True),
    "optimizer.warmup_steps": whole(0),
    "optimizer.d_coef": POSITIVE,
    "optimizer.momentum": number(0, below=1),
    "optimizer.use_bias_correction": FLAG,
    "optimizer.safeguard_warmup": FLAG,
    "schedule.num_warmup_steps": whole(0),
    "schedule.num_training_steps": whole(1),
    "resampler.width": whole(1, 65536, null=True),
    "resampler.*": whole(1, 65536),
    "tokens.time_channels": whole(2, 65536),
    "tokens.num_tokens": whole(1, 4096),
    "encoder.layer": whole(-1000, -1),
    # Lightning's trainer
    "trainer.max_steps": whole(1),
    "trainer.accumulate_grad_batches": whole(1, MAX_BATCH),
    "trainer.log_every_n_steps": whole(1),
    "trainer.gradient_clip_val": number(above=0, null=True, zero_is_null=True),
    "trainer.devices": whole(1, MAX_PROCESSES, words=("auto",), lists=True),
    "trainer.num_nodes": whole(1, MAX_PROCESSES),
    "trainer.num_sanity_val_steps": whole(0),
    "trainer.limit_val_batches": number(0),
    "trainer.strategy.timeout_minutes": number(above=0, high=MAX_COUNT),
    # what watches and writes
    "stop.grace_s": number(0, 86400),
    "*.most_skips": whole(1),
    "*heldout*.every_n_steps": whole(1, null=True),
    "heldout_check.num_samples": whole(2),
    "heldout_check.patience": whole(1, null=True),
    "heldout_check.alarm": number(0),
    "guard.stall_minutes": number(above=0, high=MAX_COUNT, null=True, zero_is_null=True),
    **dict.fromkeys(("*preview*.num_*", "scoring.num_prompts"), whole(0)),
    "*.keep_last": whole(1),
    "callbacks.stalls.minutes": number(above=0, high=MAX_COUNT, null=True),
    "callbacks.buckets.num_buckets": whole(1, TRAINING_STEPS),
    "callbacks.progress.refresh_every_n_steps": whole(1),
    "*every_n_steps": STEPS,
    # sampling
    "sampling.num_steps": whole(1, TRAINING_STEPS),
    "sampling.guidance": number(0, 1000),
    "sampling.guidance_rescale": SHARE,
    "sampling.scale": number(0, 100),
    "sampling.image_size_px": EDGE_PX,
    # evaluation and tools
    "num_seeds": whole(1),
    "benchmark.limit": whole(1, null=True),
    "method.style_fidelity": SHARE,
    "method.edge_*": number(0),
    "method.control_weight": number(0),
    "metrics.*_px": whole(1, MAX_EDGE_PX),
    "metrics.border.width": number(above=0, below=0.5),
    "metrics.*.subset_size": whole(2),
    "metrics.*.subsets": whole(1),
    "rank": whole(0, MAX_PROCESSES, null=True),
    "world": whole(1, MAX_PROCESSES, null=True),
    "pictures": whole(1),
    "samples": whole(1, null=True),
}


def range_of(option: str) -> Range | None:
    return next((known for pattern, known in RANGES.items() if fnmatchcase(option, pattern)), None)


def check(cfg: DictConfig) -> None:
    """Raise UserError that names all values out of range.

    Accepted values are normalized: 1e5 becomes an integer, a 0 that means none becomes null.
    """
    complaints = []
    for option in options_in(OmegaConf.to_container(cfg)):
        known = range_of(option)
        if known is None or OmegaConf.is_missing(cfg, option):
            continue
        value = OmegaConf.select(cfg, option)
        try:
            meant = known.read(value)
        except ValueError:
            complaints.append(f"{option}={'null' if value is None else value}: give {known}")
            continue
        if meant != value or type(meant) is not type(value):  # an expression that reads the environment stays one
            OmegaConf.update(cfg, option, meant)
    if complaints:
        raise UserError("\n".join(complaints))


def options_in(raw: Any, path: str = "") -> Iterator[str]:
    """Dotted names of all values, but for those that repeat another option (``${seed}``)."""
    if not (isinstance(raw, dict) and raw):
        if not (isinstance(raw, str) and REPEATS.fullmatch(raw)):
            yield path
        return
    for key, value in raw.items():
        if not str(key).startswith("_"):  # of Hydra, as _target_
            yield from options_in(value, f"{path}.{key}".lstrip("."))
