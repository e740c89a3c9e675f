"""`train.py` up to the end of its first step, in a process that tells when it got where; started by startup.py."""

from __future__ import annotations

import cProfile
import importlib
import json
import os
import pstats
import signal
import sys
import time
from pathlib import Path
from typing import Any

ENDED = "first step: "  # before what is told, on a line of its own


def import_libraries() -> None:
    """What the demo world's training uses of each library, imported as `ipa` does it."""
    import hydra  # noqa: F401
    import lightning  # noqa: F401
    import open_clip  # noqa: F401
    import torch  # noqa: F401
    import torchmetrics  # noqa: F401
    import wandb  # noqa: F401
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        DDIMScheduler,
        DiffusionPipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase  # noqa: F401
    from webdataset.tariterators import base_plus_ext  # noqa: F401


class Watch:
    """What is told at the end of the first step."""

    told: dict[str, Any] = {}  # noqa: RUF012
    profile: cProfile.Profile | None = None

    @classmethod
    def end(cls) -> None:
        """Tell, and end the process and its children as they stand: neither previews nor files are waited for."""
        cls.told["end_s"] = time.time()
        if cls.profile is not None:
            cls.profile.disable()
            calls: Any = pstats.Stats(cls.profile)
            cls.told["called"] = sorted({place for place, _, _ in calls.stats})
        cls.told["modules"] = list(sys.modules)
        print(ENDED + json.dumps(cls.told), flush=True)
        os.killpg(0, signal.SIGKILL)


def make_callback() -> Any:
    """A callback that ends the process after the first step; the class is made here to import nothing before."""
    from lightning import Callback

    class FirstStep(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            Watch.end()

    return FirstStep()


def run(options: list[str], preload: str | None = None, libraries: bool = True) -> None:
    """Train with these options; ``preload`` is a file of modules to import first, to tell whose functions run then."""
    for name in json.loads(Path(preload).read_text()) if preload else ():
        try:
            importlib.import_module(name)
        except Exception:  # what can be imported only from where the run did it
            continue
    if libraries:
        import_libraries()
    Watch.told["imported_s"] = time.time()
    import train

    sys.argv = ["train.py", *options, "+callbacks.first._target_=first_step.make_callback"]
    if preload is not None:
        Watch.profile = cProfile.Profile()
        Watch.profile.enable()
    train.main()
