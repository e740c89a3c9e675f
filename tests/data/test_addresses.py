from dataclasses import replace
from typing import Any

import pytest
import torch

from ipa.data.addresses import NO_DROPS, Address, DropRates, digest, draw

HERE = Address(seed=1, epoch=2, source="laion", shard="00003.tar", index=4)
LATENT = (4, 2, 2)


def numbers(address: Address, name: str = "noise") -> list[float]:
    return torch.randn(4, generator=address.generator(name)).tolist()


@pytest.mark.parametrize(
    "change", [{"seed": 0}, {"epoch": 3}, {"source": "coyo"}, {"shard": "4.tar"}, {"index": 5}], ids=str
)
def test_every_part_of_an_address_counts(change: dict[str, Any]) -> None:
    assert numbers(HERE) != numbers(replace(HERE, **change))


def test_addresses_do_not_change_between_versions() -> None:
    assert digest("a", "bc") != digest("ab", "c") and digest(1, 12) != digest(11, 2)
    assert digest("sample", 0, 0, "train", "00000.tar", 0, "noise") == 13853546056902967735


def test_kinds_of_draws_are_independent_streams() -> None:
    draws = draw([HERE], LATENT, NO_DROPS)
    assert not torch.equal(draws.noise_BCHW, draws.posterior_noise_BCHW)
    assert torch.equal(draws.noise_BCHW, draw([HERE], LATENT, DropRates(1, 0, 0)).noise_BCHW)


def test_a_row_does_not_depend_on_its_batch() -> None:
    addresses = [Address(0, 0, "train", "a.tar", i) for i in range(6)]
    whole, part = draw(addresses, LATENT, DropRates()), draw(addresses[4:], LATENT, DropRates())
    for name, tensor in vars(part).items():
        assert torch.equal(tensor, vars(whole)[name][4:]), name


def test_drop_rates_are_met_by_one_joint_draw() -> None:
    draws = draw([Address(0, 0, "train", "a.tar", i) for i in range(4000)], (1, 1, 1), DropRates(0.05, 0.1, 0.2))
    text, image = draws.drop_text_B, draws.drop_image_B
    assert (text & ~image).float().mean().item() == pytest.approx(0.05, abs=0.015)
    assert (image & ~text).float().mean().item() == pytest.approx(0.10, abs=0.02)
    assert (image & text).float().mean().item() == pytest.approx(0.20, abs=0.025)
    assert draws.time_B.min() >= 0 and draws.time_B.max() < 1
    assert draws.time_B.mean().item() == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="sum to at most 1"):
        DropRates(0.5, 0.5, 0.5)
