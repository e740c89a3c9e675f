"""Train an IP-Adapter; `python train.py --help` explains the options."""

from omegaconf import DictConfig

from ipa.cli import command, quiet_libraries


@command("train")
def main(cfg: DictConfig) -> None:
    from ipa.training.run import train  # imports torch, which help and error messages do not need

    quiet_libraries()
    train(cfg)


if __name__ == "__main__":
    main()
