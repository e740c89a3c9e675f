"""What the dashboard shows: errors over time, gradients, whether the image is used, and what is trained."""

from __future__ import annotations

import csv
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import tiny_flow
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from ipa.model import Errors, IPAdapterModel
from ipa.training.module import AdapterTraining
from ipa.training.monitors import AttentionRatios, ImagePromptGuard, StepSize, TimestepBuckets, compare_images


def errors(error: list[float], time: list[float]) -> Errors:
    return Errors(torch.tensor(error), torch.full((len(error),), 7.0), torch.tensor(time))


def test_buckets_are_the_plain_means_by_noise_level() -> None:
    buckets = TimestepBuckets(num_buckets=4)
    buckets.add(errors([1.0, 2.0, 3.0], [0.0, 0.2, 0.25]))
    buckets.add(errors([5.0, 6.0], [0.999, 0.1]))
    expected = {"0.0-0.25": 3.0, "0.25-0.5": 3.0, "0.75-1.0": 5.0}

    assert buckets.take() == {f"train/error_t/{name}": pytest.approx(mean) for name, mean in expected.items()}
    buckets.add(errors([4.0], [0.1]))
    assert buckets.take() == {"train/error_t/0.0-0.25": 4.0}


def using_image() -> IPAdapterModel:
    """A tiny model and an adapter that was trained until it tells the images of a batch apart."""
    model = tiny.make_model()
    model.adapter.install()
    optimizer = torch.optim.AdamW(model.trainable.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model.errors(tiny.make_batch(4)).loss.backward()
        optimizer.step()
    return model


def ignoring() -> IPAdapterModel:
    """An adapter that has nothing to say: V′ is zero everywhere."""
    model = tiny.shake(tiny.make_model())
    model.adapter.install()
    with torch.no_grad():
        for branch in model.adapter.branches:
            branch.to_v_ip.weight.zero_()
    return model


def test_images_are_compared_with_the_neighbours_and_nothing_dropped(model: IPAdapterModel) -> None:
    model.adapter.install()
    kept, dropped = tiny.make_batch(4), tiny.make_batch(4, drop_text=True, drop_image=True)
    neighbours = replace(kept, reference_B3HW=kept.reference_B3HW[[3, 0, 1, 2]])
    with torch.no_grad():
        expected = [model.errors(each).error_B.mean().item() for each in (kept, neighbours)]

    assert list(compare_images(model, dropped)) == pytest.approx(expected, rel=1e-6)
    assert dropped.draws.drop_image_B.all()
    assert expected[0] != pytest.approx(expected[1], rel=1e-4)


def judged(gaps: list[float], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said to measurements at steps 10, 20, 30 …"""
    guard = ImagePromptGuard(every_n_steps=10, patience=4)
    with caplog.at_level(logging.WARNING, logger="ipa.training.monitors"):
        for i, gap in enumerate(gaps, start=1):
            guard.judge(gap, 10 * i)
    return caplog.messages


EDGE = [x / 3**0.5 for x in (1.9, 2.1)]  # of mean ± 1 the deviation is √(4/3), of four the standard error √(1/3)


@pytest.mark.parametrize(
    ("gaps", "ignored"),
    [
        ([EDGE[0] + 1, EDGE[0] - 1] * 4, True),  # below two standard errors
        ([EDGE[1] + 1, EDGE[1] - 1] * 4, False),
        ([0.0, 0.0, 0.0], False),  # patience is not at its end
        ([0.01, 0.011, 0.009, 0.01], False),  # small but sure
        ([0.02, -0.02, 0.01, -0.01], True),
        ([0.10, -0.06, 0.05, -0.01], True),  # above zero on average, within the scatter
        ([-0.1, -0.1, -0.1, -0.1], True),
        ([0.0, 0.0, 0.0, 0.2, 0.2, 0.2, 0.2], True),  # at the time of the warning it was
        ([0.2, 0.2, 0.2, 0.2, 0.0, 0.0, 0.0, 0.0], True),  # it was used at first
    ],
)
def test_it_warns_once_by_the_last_measurements(
    gaps: list[float], ignored: bool, caplog: pytest.LogCaptureFixture
) -> None:
    messages = judged(gaps, caplog)
    assert len(messages) == ignored and all(" the image prompt" in each for each in messages)


def test_measurements_and_the_warning_survive_a_round_trip(caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = (ImagePromptGuard(every_n_steps=10, patience=4) for _ in range(3))
    for _ in range(3):
        first.judge(0.0, 10)
    second.load_state_dict(first.state_dict())
    second.judge(0.0, 40)
    assert [each.startswith("step 40: the image prompt") for each in caplog.messages] == [True]
    third.load_state_dict(second.state_dict())
    for _ in range(5):
        third.judge(0.0, 50)
    assert len(caplog.messages) == 1 and third.state_dict() == {"gaps": [0.0] * 4, "told": True, "attention": {}}
    with pytest.raises(ValueError, match="patience=1"):  # one measurement has no scatter
        ImagePromptGuard(every_n_steps=10, patience=1)


def fit(model: IPAdapterModel, folder: Path, callbacks: list[L.Callback], **options: Any) -> list[dict[str, str]]:
    """Four steps on one batch in a real trainer; the rows that it logs every second step."""
    trainer = L.Trainer(
        max_steps=4,
        log_every_n_steps=2,
        callbacks=callbacks,
        logger=CSVLogger(folder, name="", version=""),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = AdapterTraining(model, partial(torch.optim.SGD, lr=LR))
    trainer.fit(module, DataLoader([tiny.make_batch(4)] * 4, batch_size=None))
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


LR = 1e-9  # the weights stay as they are within rounding


def values(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_logs_all_of_it(tmp_path: Path) -> None:
    model = tiny.shake(tiny.make_model())
    model.adapter.install()
    expected, own_other = model.errors(tiny.make_batch(4)), compare_images(model, tiny.make_batch(4))
    expected.loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.trainable.parameters()])
    by_bucket = TimestepBuckets(2)
    by_bucket.add(expected)
    model.adapter.remove()
    monitors = [TimestepBuckets(2), StepSize(), ImagePromptGuard(every_n_steps=2, patience=2)]
    rows = fit(model, tmp_path, monitors, gradient_clip_val=1e-3)

    def twice(value: float | Tensor) -> Any:
        return pytest.approx([float(value)] * 2, rel=1e-4)

    assert values(rows, "train/grad_norm") == twice(gradient.norm()) and values(rows, "train/lr") == twice(LR)
    for name, mean in by_bucket.take().items():
        assert values(rows, name) == twice(mean)
    own, other = own_other
    assert values(rows, "image_prompt/own") == twice(own) and values(rows, "image_prompt/other") == twice(other)
    assert values(rows, "image_prompt/gap") == pytest.approx([(other - own) / own] * 2, abs=1e-5)
    ratios = AttentionRatios()
    compare_images(model, tiny.make_batch(4), ratios)
    layers, blocks = ratios.take({host.name: host.block for host in model.family.hosts()})
    for name, ratio in layers.items():
        assert values(rows, f"image_attention/{name}") == twice(ratio)
    assert monitors[2].attention == pytest.approx(blocks, rel=1e-4)


FLOW_CASES = {
    "flux": (tiny_flow.make_flux, {}),
    "instantx": (tiny_flow.make_flux, {"hosts": "all"}),
    "sd35_medium": (tiny_flow.make_sd35_medium, {}),
}


@pytest.mark.parametrize("name", FLOW_CASES)
def test_transformers_are_watched_in_every_host(name: str) -> None:
    """Own and added attention are those that the layer hands on: as its third output, or summed to its projection."""
    make, options = FLOW_CASES[name]
    model = tiny.shake(tiny_flow.make_model(make, **options))
    model.adapter.install()
    seen: dict[str, list[Tensor]] = {}
    found: dict[str, Any] = {}
    for host in model.family.hosts():
        keep = partial(seen.setdefault, host.name)
        projection = getattr(host.attention, "to_out", None)
        if name == "flux":
            host.attention.register_forward_hook(lambda _, args, out, keep=keep: keep([out[0], out[2]]) and None)
        elif projection is not None:
            projection[0].register_forward_pre_hook(lambda _, args, keep=keep: keep([args[0]]) and None)
    model.watch = lambda host, own, image: found.setdefault(host, (own, image))
    model.errors(tiny.make_batch(4))

    assert found.keys() == {host.name for host in model.family.hosts()}
    for host, handed_on in seen.items():
        own, image = found[host]
        expected = [own, image] if name == "flux" else [own + image]
        assert image.norm() > 0
        torch.testing.assert_close(handed_on, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_only_a_training_that_ignores_the_image_is_warned_and_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Images that are not used make no difference to the bit; those that are used make more than 5 %."""
    for model, uses in ((using_image(), True), (ignoring(), False)):
        own, other = compare_images(model, tiny.make_batch(4))
        assert other > 1.05 * own if uses else own == other > 0
        model.adapter.remove()
        rows = fit(model, tmp_path / str(uses), [ImagePromptGuard(every_n_steps=1, patience=2)])
        gaps = values(rows, "image_prompt/gap")
        assert min(gaps) > 0.05 if uses else gaps == [0] * 4
        warnings = [message for message in caplog.messages if "prompt" in message]
        assert [each.startswith("step 2: the image prompt") for each in warnings] == [True] * (not uses)


def test_ratios_are_those_of_the_norms_and_grow_with_the_scale(model: IPAdapterModel) -> None:
    model.adapter.install()
    inputs, seen = tiny.make_inputs(model), dict[str, tuple[Tensor, Tensor]]()
    first, doubled, off = (AttentionRatios() for _ in range(3))

    def watch(host: str, text: Tensor, image: Tensor) -> None:
        seen[host] = (text, image)
        first.add(host, text, image)

    groups = {host.name: host.block for host in model.family.hosts()}
    with torch.no_grad():
        for add, scale in ((watch, 1.0), (doubled.add, 2.0), (off.add, 0.0)):
            model.watch = add
            model.predict(*inputs, scale=scale)
        model.watch = None
    layers, blocks = first.take(groups)

    assert layers.keys() == groups.keys() and blocks.keys() == {*groups.values()}
    for host, (text, image) in seen.items():
        assert layers[host] == pytest.approx(float(image.norm() / text.norm()), rel=1e-5)
    entry = next(iter(seen))  # whose queries do not depend on the scale
    assert doubled.take(groups)[0][entry] == pytest.approx(2 * layers[entry], rel=1e-5)
    assert set(off.take(groups)[0].values()) == {0.0}
    inside = [pair for host, pair in seen.items() if groups[host] == groups[entry]]
    text, image = (torch.cat([pair[i].flatten() for pair in inside]).norm() for i in (0, 1))
    assert blocks[groups[entry]] == pytest.approx(float(image / text), rel=1e-5)


def test_a_simple_adapter_has_no_ratios_of_its_layers() -> None:
    model = tiny.make_model(kind="simple")
    model.adapter.install()
    ratios = AttentionRatios()
    compare_images(model, tiny.make_batch(4), ratios)

    assert ratios.take({}) == ({}, {}) and model.watch is None
