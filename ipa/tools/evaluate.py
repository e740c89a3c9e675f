"""Evaluate systems that take image prompts; `python evaluate.py --help` lists the options."""

import sys

from omegaconf import DictConfig

from ipa.cli import command, quiet_libraries


@command("evaluate")
def main(cfg: DictConfig) -> None:
    from ipa.evaluation.run import evaluate  # imports torch, which takes seconds

    quiet_libraries()
    try:
        evaluate(cfg)
    except KeyboardInterrupt:
        print("\nStopped. The same command resumes.", file=sys.stderr)
        sys.exit(130)  # the shells' code for Ctrl-C


if __name__ == "__main__":
    main()
