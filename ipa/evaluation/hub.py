"""Whether the model hub answers, asked once: without a network its libraries retry every file for half a minute."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)+")
TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


def goes_offline(parts: Mapping[str, Any]) -> bool:
    """Whether parts that may come from the hub have to do without it: then only its cache is read in this process.

    The hub is not asked if the configurations in ``parts`` name files and folders of this machine alone.
    """
    from huggingface_hub import constants, get_session

    if not may_be_on_hub(parts):
        return False
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S)
        except Exception as error:  # the session's library decides on the class
            log.warning("%s does not answer (%s): only what is on this machine is used", constants.ENDPOINT, error)
            constants.HF_HUB_OFFLINE = True
    return constants.HF_HUB_OFFLINE


def may_be_on_hub(node: Any, name: str = "") -> bool:
    """Whether a configuration holds owner/name, or a tag of open_clip's weights, that is no path here."""
    if isinstance(node, Mapping):
        return any(may_be_on_hub(child, key) for key, child in node.items())
    is_remote = isinstance(node, str) and not Path(node).exists()
    return is_remote and (name == "pretrained" or HUB_ID.fullmatch(node) is not None)
