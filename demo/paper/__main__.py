"""The command; `python -m demo.paper --help` explains the options."""

from omegaconf import DictConfig

from ipa.cli import command, quiet_libraries


@command("paper")
def main(cfg: DictConfig) -> None:
    from demo.paper.run import make_page  # imports torch, which help and error messages do not need

    quiet_libraries()
    make_page(cfg)


if __name__ == "__main__":
    main()
