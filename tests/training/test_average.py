"""The average of the weights: its recursion, its way in and out of the model, its state, and what it does not copy."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn

from ipa.model import IPAdapterModel
from ipa.training.average import WeightAverage

Weights = dict[str, Tensor]


def weights_of(module: nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def average_over(model: IPAdapterModel, decay: float, steps: int) -> tuple[WeightAverage, list[Weights]]:
    """An average that has taken in so many moves of the weights, and the weights after each."""
    average, seen = WeightAverage(model.trainable, decay), []
    for step in range(steps):
        tiny.shake(model, seed=step)
        average.update()
        seen.append(weights_of(model.trainable))
    return average, seen


def averaged_weights(average: WeightAverage) -> Weights:
    return {name: value.clone() for name, value in average.state_dict().items() if name != "count"}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_it_is_the_recursion_written_out(model: IPAdapterModel, decay: float, steps: int) -> None:
    average, seen = average_over(model, decay, steps)
    expected = {name: value.double() for name, value in seen[0].items()}
    for n, weights in enumerate(seen[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        expected = {name: d * value + (1 - d) * weights[name].double() for name, value in expected.items()}

    assert int(average.state_dict()["count"]) == steps
    for name, value in averaged_weights(average).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_inside_the_module_has_the_average_and_outside_what_it_had(model: IPAdapterModel) -> None:
    average, seen = average_over(model, 0.9, 5)
    expected = averaged_weights(average)
    with average.inside():
        assert same(weights_of(model.trainable), expected)
    assert same(weights_of(model.trainable), seen[-1])

    with pytest.raises(RuntimeError, match="in the preview"), average.inside():
        raise RuntimeError("in the preview")
    assert same(weights_of(model.trainable), seen[-1])
    assert same(averaged_weights(average), expected) and not same(expected, seen[-1])
    assert all(parameter.requires_grad for parameter in model.trainable.parameters())


def test_the_state_survives_a_round_trip_and_the_average_continues(model: IPAdapterModel) -> None:
    whole, _ = average_over(model, 0.9999, 8)
    again = tiny.shake(tiny.make_model())
    first, _ = average_over(again, 0.9999, 3)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    second = WeightAverage(again.trainable, 0.9999)
    assert not same(averaged_weights(second), averaged_weights(first))
    second.load_state_dict(state)
    assert same(second.state_dict(), state)

    for step in range(3, 8):
        tiny.shake(again, seed=step)
        second.update()
    assert int(second.state_dict()["count"]) == 8
    for name, value in averaged_weights(second).items():
        assert torch.equal(value, averaged_weights(whole)[name])


def test_it_starts_as_the_weights_are_with_a_state_of_the_trainable_set_alone(model: IPAdapterModel) -> None:
    average = WeightAverage(model.trainable, 0.9)
    state = average.state_dict()

    assert set(state) == {name for name, _ in model.trainable.named_parameters()} | {"count"}
    assert same(averaged_weights(average), weights_of(model.trainable))
    assert not any(value.requires_grad for value in state.values())
    trained = {parameter.data_ptr() for parameter in model.trainable.parameters()}
    assert not trained & {value.data_ptr() for value in state.values()}
    tiny.shake(model)
    moved = weights_of(model.trainable)
    with average.inside():  # nothing is taken in yet
        assert same(weights_of(model.trainable), moved)
