"""The saved configuration of a run, and whether a run may be resumed with another one.

The command line builds the run. ``config.yaml`` is compared with it as data and never instantiated: an option that
would have changed the steps already made must have its saved value, all others may change. Expressions that read the
environment, ``${oc.env:NAME}``, are saved and compared as they were written.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ipa.errors import UserError, brief
from ipa.files import write_atomically
from ipa.secrets import hide, unresolved_where_secret

log = logging.getLogger(__name__)

# these change no step that was already made: where it runs, how far, and what is watched and written
MAY_CHANGE = (
    *("trainer.max_steps", "schedule.num_training_steps", "trainer.log_every_n_steps"),
    *("trainer.accelerator", "trainer.strategy", "trainer.devices", "trainer.num_nodes"),
    *("trainer.accumulate_grad_batches", "gradient_checkpointing", "compile", "data.num_workers", "data.schemes"),
    *("data.val", "data.val_batch_size"),
    *("name", "group", "paths", "resume", "stop", "guard", "profile", "logger", "licence", "next_command", "dry_run"),
    *("callbacks", "checkpoint", "preview", "sampling", "scoring", "judge", "image_prompt_check", "heldout_check"),
)
# these name a place: what is there must be the same, see `ipa.training.callbacks.SameParts`
PLACES = (
    *("data.train", "data.known.*.shards", "data.caches.*.shards", "data.texts", "data.pairs.index"),
    *("base.path", "base.config", "base.transformer_file", "encoder.path", "encoder.name", "encoder.pretrained"),
)
MAX_NAMED = 12  # options in one message
ABSENT = "(absent)"

Differences = Mapping[str, tuple[Any, Any]]  # dotted name → (saved, given)


def settle_configuration(cfg: DictConfig, folder: Path, resumes: bool) -> tuple[DictConfig, Differences]:
    """Check ``cfg`` against the saved configuration of a resumed run, save it, and return it resolved.

    Also returns the places that changed. Raises UserError with every option that may not change, its saved value, and
    what to type.
    """
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    given = unresolved_where_secret(resolved, OmegaConf.to_container(cfg))
    path = folder / "config.yaml"
    found = differences(read_configuration(path), given) if resumes else {}
    check_differences(found, path)
    save(path, given)
    return OmegaConf.create(resolved), {name: pair for name, pair in found.items() if matches(name, PLACES)}


@rank_zero_only
def save(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, lambda temporary: OmegaConf.save(OmegaConf.create(dict(content)), temporary))


def read_configuration(path: Path) -> dict[str, Any]:
    """The saved configuration of a run as plain data, nothing resolved; raises UserError."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        Path(content["paths"]["run"])
    except (OSError, yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"{path} is not the configuration of a run ({brief(error)}), so the run cannot be resumed. Restore the "
            "file, or start another run with name=… resume=CHECKPOINT"
        ) from error
    return content


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> Differences:
    """Where they differ by more than the place of the run's folder."""
    before, now = (flatten(content, content["paths"]["run"]) for content in (saved, given))
    names = [name for name in now | before if before.get(name, ABSENT) != now.get(name, ABSENT)]
    return {name: (before.get(name, ABSENT), now.get(name, ABSENT)) for name in names}


def check_differences(found: Differences, path: Path) -> None:
    refused = [name for name in found if not matches(name, (*MAY_CHANGE, *PLACES))]
    if not refused:
        for name, (before, now) in found.items():
            log.info("%s: %s, before %s", name, show(now), show(before))
        return
    lines = [f"  {name}: saved {show(found[name][0])}, given {show(found[name][1])}" for name in refused[:MAX_NAMED]]
    lines += [f"  … and {len(refused) - MAX_NAMED} more"] if len(refused) > MAX_NAMED else []
    typed = " ".join(to_type(name, *found[name]) for name in refused[:MAX_NAMED])
    raise UserError(
        f"the run in {path.parent} was started with other options, which would change the steps already made:\n"
        + "\n".join(lines)
        + f"\nTo resume it, give its experiment= and recipe= and\n  {typed}\nTo start a new run, give another name="
    )


def matches(name: str, options: Sequence[str]) -> bool:
    return any(fnmatch(name, each) or name.startswith(f"{each}.") for each in options)


def show(value: Any) -> str:
    return hide(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def to_type(name: str, saved: Any, given: Any) -> str:
    """The override that gives an option its saved value."""
    if saved == ABSENT:
        return f"~{name}"
    return f"{'+' if given == ABSENT else ''}{name}={show(saved)}"


def flatten(node: Any, run: str, path: str = "") -> dict[str, Any]:
    """Dotted name → value, with ``RUN`` for the run's folder."""
    if isinstance(node, Mapping) and node:
        parts = (flatten(child, run, f"{path}.{name}".lstrip(".")) for name, child in node.items())
        return {name: value for part in parts for name, value in part.items()}
    inside = isinstance(node, str) and (node == run or node.startswith(f"{run}/"))
    return {path: f"RUN{node[len(run) :]}" if inside else node}
