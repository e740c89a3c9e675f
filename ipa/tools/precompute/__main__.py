"""Shards of pictures in, feature shards out; ``--help`` prints conf/hydra/help/precompute.yaml."""

from omegaconf import DictConfig

from ipa.cli import command, quiet_libraries


@command("precompute")
def main(cfg: DictConfig) -> None:
    from ipa.tools.precompute.run import precompute  # imports torch, which --help and typos do not need

    quiet_libraries()
    precompute(cfg)


if __name__ == "__main__":
    main()
