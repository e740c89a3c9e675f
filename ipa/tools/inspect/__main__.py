"""Look into shards as training reads them; ``--help`` prints conf/hydra/help/inspect.yaml."""

from omegaconf import DictConfig

from ipa.cli import command


@command("inspect")
def main(cfg: DictConfig) -> None:
    from ipa.tools.inspect.findings import inspect  # imports torch, which --help and typos do not need

    inspect(cfg)


if __name__ == "__main__":
    main()
