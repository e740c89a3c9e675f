"""The command; `python -m demo.paper --help` explains the options."""

import sys

from omegaconf import DictConfig

from ipa.cli import command, quiet_libraries


@command("paper")
def main(cfg: DictConfig) -> None:
    from demo.paper.run import make_page  # imports torch, which help and error messages do not need

    quiet_libraries()
    try:
        make_page(cfg)
    except KeyboardInterrupt:
        print("\nStopped. The same command continues.", file=sys.stderr)
        sys.exit(130)  # the shells' code for Ctrl-C


if __name__ == "__main__":
    main()
