"""Loads the model and serves the page until the process is interrupted."""

from __future__ import annotations

import hmac
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from omegaconf import OmegaConf

from ipa.errors import UserError
from ipa.export.loading import known_sources
from ipa.export.reading import read_adapter
from ipa.tools.app.page import Page
from ipa.tools.app.settings import LOADING
from ipa.tools.app.uploads import MAX_BYTES
from ipa.tools.pipelines import load_control
from ipa.tools.sample import load

MAX_EVENTS = 100  # of gradio's own queue


def run(options: Any) -> None:
    """Raises UserError for parts that cannot be loaded, and for an address that is not free."""
    given: Any = OmegaConf.to_container(options)
    fixed = {name: given[name] for name in ("adapter", "control_model", *LOADING)}
    if options.base is None:
        check_bases(options.adapter)
    if options.control_model is not None:
        load_control(options.control_model)
    page = Page(load(fixed, options.device), fixed)
    blocks = page.build()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that temporary files go
    try:
        launch(blocks, options.host, options.port, options.password)
        print(f"http://{options.host}:{options.port} is open until Ctrl-C", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:
        for job in list(page.jobs.values()):
            job.stop.set()  # so that the process can end
        blocks.close(verbose=False)


def check_bases(adapters: list[str]) -> None:
    """Raises UserError unless all were trained on one base, as far as their files say."""
    bases = {known_sources(read_adapter(Path(each)).metadata, Path(each)).get("base") for each in adapters}
    if len(bases) > 1:
        names = ", ".join(sorted(map(str, bases)))
        raise UserError(f"the adapters were trained on different bases ({names}): give base=…, the one to use")


def launch(blocks: gr.Blocks, host: str, port: int, password: str | None) -> None:
    try:
        blocks.queue(max_size=MAX_EVENTS, default_concurrency_limit=4).launch(
            server_name=host,
            server_port=port,
            # gradio asks for a name as well: any will do
            auth=password and (lambda name, given: hmac.compare_digest(given.encode(), password.encode())),
            auth_message="Any name, and the password that you were given.",
            prevent_thread_lock=True,
            max_file_size=MAX_BYTES,
            css_paths=Path(__file__).with_name("page.css"),
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            footer_links=[],
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
        )
    except OSError as error:
        raise UserError(f"host={host} port={port}: cannot listen there ({error}); give another port=") from error
