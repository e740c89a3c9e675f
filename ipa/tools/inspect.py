"""Look into shards as training reads them: counts, rejects by reason, sizes, captions, speed, and a contact sheet.

    python -m ipa.tools.inspect                                              # the demo world
    python -m ipa.tools.inspect recipe=sd15 data.train=/data/laion samples=null

Takes the configuration of train.py. The work is done in `ipa.tools.inspecting`; this imports only hydra at the top.
"""

from omegaconf import DictConfig

from ipa.cli import command


@command(config_path="../../conf", config_name="inspect")
def main(cfg: DictConfig) -> None:
    from ipa.tools.inspecting import inspect

    inspect(cfg)


if __name__ == "__main__":
    main()
