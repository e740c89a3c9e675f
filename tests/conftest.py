"""Fixtures for all tests: seed 0, and tiny real models (see ``tiny.py``)."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from ipa.model import IPAdapterModel

yaml.SafeLoader = yaml.CSafeLoader  # composing the configuration takes half as long  # type: ignore[misc]
# the scripts that made the demo world, without its weights
sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))


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
