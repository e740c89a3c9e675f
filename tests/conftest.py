"""Fixtures for all tests: seed 0, and tiny real models (see ``tiny.py``)."""

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
import yaml

from ipa.encoders.image_encoder import ImageEncoder
from ipa.model import IPAdapterModel
from ipa.types import EncoderWidths

yaml.SafeLoader = yaml.CSafeLoader  # composing the configuration takes half as long  # type: ignore[misc]
huggingface_hub.constants.HF_HUB_OFFLINE = True  # no test asks a model hub, or waits for one
# The first backward starts a thread per device, after which forks cannot train; fake tensors pretend to have one.
torch.zeros((), requires_grad=True).backward()
# the scripts that made the demo world, without its weights
sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))


def measured_once(measure: Callable[..., EncoderWidths]) -> Callable[..., EncoderWidths]:
    """Measuring an encoder takes most of the time in which a tiny model is loaded."""
    known: dict[Any, EncoderWidths] = {}

    @functools.wraps(measure)
    def widths(self: ImageEncoder, image_size_px: int) -> EncoderWidths:
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in self.state_dict().items())
        key = (type(self), self.source, self.weights, self.layer, image_size_px, shapes)
        if key not in known:
            known[key] = measure(self, image_size_px)
        return known[key]

    return widths


ImageEncoder._measure = measured_once(ImageEncoder._measure)  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """Commands configure the logs of their process, and a run on another rank silences them."""
    yield
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.split(".")[0] == "ipa":
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a tool's ``main`` in this process with these arguments and options; returns its output."""

    def run(main: Callable[[], None], *arguments: object, **options: object) -> str:
        words = [*map(str, arguments), *(f"{name}={value}" for name, value in options.items())]
        monkeypatch.setattr(sys, "argv", ["tool.py", *words])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def model() -> IPAdapterModel:
    """A tiny model with random adapter weights; the adapter is not installed."""
    return tiny.shake(tiny.make_model())


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline folder."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny.make_pipeline(tiny.make_family("v_prediction", zero_snr=True)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The ``local-dir:`` name of an open_clip folder."""
    return tiny.save_clip(tmp_path_factory.mktemp("tiny") / "clip")
