"""Look into shards as training reads them: counts, rejects by reason, sizes, captions, speed, and a contact sheet.

    python -m ipa.tools.inspect                                              # the demo data
    python -m ipa.tools.inspect recipe=sd15 data.train=/data/laion samples=null

Takes the configuration of train.py. Loads no model: sizes come from the configuration files of base and encoder.
"""

from omegaconf import DictConfig

from ipa.cli import command


@command("inspect")
def main(cfg: DictConfig) -> None:
    from ipa.tools.inspect.findings import inspect  # imports torch, which --help and typos do not need

    inspect(cfg)


if __name__ == "__main__":
    main()
