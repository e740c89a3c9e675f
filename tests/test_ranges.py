"""The table of ranges: it covers every number, refuses what cannot work, and says what can."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from documented import composed
from omegaconf import OmegaConf

from ipa.errors import UserError
from ipa.ranges import RANGES, check, range_of, whole

COMMANDS: dict[str, list[tuple[str, ...]]] = {
    "train": [
        ("recipe=demo", "debug=default"),
        ("recipe=sdxl", "data=cache", "trainer=ddp", "optimizer=schedule_free"),
        ("recipe=flux", "schedule=linear", "optimizer=prodigy"),
        ("recipe=sd35_medium", "experiment=decoupled_time_aware"),
    ],
    "evaluate": [
        ("benchmark=demo",),
        ("benchmark=coco2017", "method=reference_only"),
        ("benchmark=folder", "method=ip_adapter_control"),
    ],
    **{command: [("recipe=demo",)] for command in ("precompute", "inspect", "pair")},
}
EXEMPT = ("filters.",)  # ipa/data/shards/filters.py
ODD = [-1, 0, 0.5, 10**30, 1e30, float("nan"), float("inf"), None, "text", True]

MAY_BE_NEGATIVE = ("encoder.layer", "base.times.logit_mean", "base.times.mode_scale")


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not (isinstance(node, dict) and node):
        yield path, node
        return
    for key, value in node.items():
        if not key.startswith("_"):
            yield from leaves(value, f"{path}.{key}".lstrip("."))


@cache
def options() -> dict[str, Any]:
    """Option and value of everything in any configuration."""
    every = [composed(command, choices) for command, worlds in COMMANDS.items() for choices in worlds]
    return {option: value for cfg in every for option, value in leaves(OmegaConf.to_container(cfg))}


def numbers() -> list[str]:
    """All options whose value is a number or a switch."""
    return [
        option
        for option, value in options().items()
        if isinstance(value, int | float) and not any(word in option for word in EXEMPT)
    ]


def test_every_number_has_a_range_and_a_value_within() -> None:
    assert len(numbers()) > 70
    for option in numbers():
        assert (known := range_of(option)) is not None, option
        assert known.read(options()[option]) == options()[option], option


def test_every_range_is_of_an_option() -> None:
    not_in_the_files = {"data.augment.area", "data.augment.*", "optimizer.eps"}

    used = {id(range_of(option)) for option in options()}

    assert {name for name, known in RANGES.items() if id(known) not in used} <= not_in_the_files


@pytest.mark.parametrize("value", ODD, ids=str)
def test_an_odd_value_is_refused_in_a_line_or_means_something(value: Any) -> None:
    for option in numbers():
        known = range_of(option)
        assert known is not None
        cfg = OmegaConf.create()
        OmegaConf.update(cfg, option, value)
        try:
            meant = known.read(value)
        except ValueError:
            with pytest.raises(UserError) as caught:
                check(cfg)
            assert str(caught.value) == f"{option}={'null' if value is None else value}: give {known}"
            continue
        check(cfg)
        assert OmegaConf.select(cfg, option) == meant, option
        assert value != "text", option
        assert value != -1 or option in MAY_BE_NEGATIVE, option
        assert meant is None or isinstance(meant, (int, float) if known.kind is float else known.kind), option
        assert known.kind is float or meant is None or meant <= 2**32, option


def test_what_is_meant() -> None:
    cfg = OmegaConf.create({"trainer": {"max_steps": 1e5}, "min_snr_gamma": 0, "ema": {"decay": 0.0}, "own": "${seed}"})
    cfg.seed, cfg.trainer.devices = "${oc.decode:${oc.env:IPA_NO_SUCH_VARIABLE,3}}", [0, 1]

    check(cfg)

    assert cfg.trainer.max_steps == 100_000 and isinstance(cfg.trainer.max_steps, int)
    assert cfg.min_snr_gamma is None and cfg.ema.decay is None
    assert cfg.trainer.devices == [0, 1]
    assert cfg.seed == 3 and OmegaConf.is_interpolation(cfg, "seed")  # saved as it was written


def test_all_wrong_values_are_named_at_once_and_repeated_ones_once() -> None:
    cfg = OmegaConf.create({"seed": -1, "callbacks": {"previews": {"seed": "${seed}"}}, "trainer": {"devices": "two"}})

    with pytest.raises(UserError) as caught:
        check(cfg)

    assert str(caught.value).splitlines() == [
        "seed=-1: give an integer at least 0 and at most 4294967295",
        "trainer.devices=two: give an integer at least 1 and at most 1024, or auto, or a list",
    ]
    assert str(whole(1, null=True, zero_is_null=True, high=9)).endswith("or 0 or null for none")
