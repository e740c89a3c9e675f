"""Open a page for people who use adapters: drop pictures, type a text, move λ, compare.

    python -m ipa.tools.app adapter=runs/…/adapter.safetensors
    python -m ipa.tools.app 'adapter=[a.safetensors,b.safetensors]' control_model=FOLDER
    python -m ipa.tools.app adapter=FILE host=0.0.0.0 'password=${oc.env:IPA_PASSWORD}'

Only this machine can open the page unless host= is given, which needs a password. All settings of the page can be
copied as a command of ipa.tools.sample. Several adapters share one base. Nothing is loaded from the network.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import MISSING

from ipa.cli import quiet_libraries
from ipa.errors import UserError
from ipa.tools.options import option, tool

LOCAL = "127.0.0.1"
MIN_PASSWORD_LENGTH = 8


@dataclass
class Options:
    adapter: list[str] = option(MISSING, "adapter file, checkpoint, or run folder; several on one base can be compared")
    host: str = option(LOCAL, "address to listen on, 0.0.0.0 for all; any other than this machine's needs password=")
    port: int = option(7860, "port to listen on", at_least=1, at_most=65535)
    password: str | None = option(None, "required to open the page; give it as '${oc.env:NAME}'")
    control_model: str | None = option(None, "ControlNet or T2I-Adapter for control images: folder or hub id")
    base: str | None = option(None, "base model in place of the metadata's: diffusers folder, hub id or .safetensors")
    base_config: str | None = option(None, "for a base in one file: diffusers folder or hub id with its layout")
    encoder: str | None = option(None, "image encoder in place of the metadata's: open_clip name or folder")
    encoder_weights: str | None = option(None, "open_clip's tag of pretrained weights, or a file")
    device: str | None = option(None, "torch device; null: a GPU if there is one, or else the CPU")
    dtype: str = option("float32", "data type of the frozen weights", one_of=("float32", "float16", "bfloat16"))


def serve(options: Any) -> None:
    """Until it is interrupted; raises UserError."""
    check_password(options.host, options.password)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with TemporaryDirectory(prefix="ipa-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read while gradio is imported
        check_gradio()
        from ipa.tools.app.server import run

        quiet_libraries()
        run(options)


def check_password(host: str, password: str | None) -> None:
    is_local = host == "localhost"
    with suppress(ValueError):
        is_local |= ip_address(host).is_loopback
    if not is_local and not password:
        raise UserError(f"host={host}: others can reach this page, so give password='${{oc.env:NAME}}'")
    if password is not None and len(password) < MIN_PASSWORD_LENGTH:
        raise UserError(f"password=…: give at least {MIN_PASSWORD_LENGTH} characters")


def check_gradio() -> None:
    try:
        import gradio
    except ImportError as error:
        raise UserError("the page needs gradio 6: pip install 'gradio>=6', or in a checkout -e '.[app]'") from error
    if int(gradio.__version__.partition(".")[0]) < 6:
        raise UserError(f"the page needs gradio 6, this is {gradio.__version__}: pip install 'gradio>=6'")


main = tool(Options, serve, __doc__)

if __name__ == "__main__":
    main()
