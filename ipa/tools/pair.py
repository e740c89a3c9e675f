"""Index the samples of shards by their groups, so that training can pair them (docs/pairs.md)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ipa.cli import command
from ipa.errors import UserError


@command("pair")
def main(cfg: DictConfig) -> None:
    pair(cfg)


def pair(cfg: DictConfig) -> dict[str, Any]:
    """Write the index and return its metadata; raises UserError."""
    from tqdm import tqdm

    from ipa.data.pairs.building import build_index, in_words, list_jobs
    from ipa.data.pairs.options import WAYS, Pairs

    groups: Any = OmegaConf.to_container(OmegaConf.create({"by": cfg.by, "differ": cfg.differ}))
    pairs = Pairs.of(groups)
    if not pairs.by:
        raise UserError(f"by=null: {WAYS}")
    sources = open_sources(cfg)
    jobs = list_jobs(sources, None if cfg.cache is None else open_features(cfg.cache, sources))
    workers = min(cfg.workers or len(os.sched_getaffinity(0)), len(jobs))
    with tqdm(total=len(jobs), unit=" shards", mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        about = build_index(jobs, pairs, Path(cfg.out), workers, bar.update)
    for line in in_words(about):
        print(line)
    print(f"wrote {cfg.out}: {Path(cfg.out).stat().st_size / 1e6:.1f} MB")
    return about


def open_sources(cfg: DictConfig) -> Sequence[Any]:
    """The sources of the data, as training reads them; raises UserError for a feature cache."""
    from hydra.utils import instantiate

    from ipa.data.datamodule import ShardDataModule
    from ipa.data.pairs.options import UNPAIRED

    data = instantiate(cfg.data, pairs=UNPAIRED)
    if not isinstance(data, ShardDataModule):
        raise UserError("a feature cache has no metadata: give the pictures with data.train=, and cache=CACHE")
    return data.train_order.sources


def open_features(folder: str, sources: Sequence[Any]) -> dict[str, Any]:
    """The cache of each source, in the folders that ``ipa.tools.precompute`` writes."""
    from ipa.data.cache.source import CacheSource

    folders = {each.name: folder if len(sources) == 1 else os.path.join(folder, each.name) for each in sources}
    caches = {name: CacheSource.of(path) for name, path in folders.items()}
    for name, cache in caches.items():
        if cache.name != name:
            raise UserError(f"cache={folders[name]} was made from {cache.name}, and these data are called {name}")
    return caches


if __name__ == "__main__":
    main()
