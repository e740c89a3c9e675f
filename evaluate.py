"""Evaluate systems with image prompts. `python evaluate.py --help` tells the options.

python evaluate.py adapter=demo/adapters/decoupled_global.safetensors        the embedded demo world
python evaluate.py -m 'method=glob(*)' benchmark=coco2017                    the paper's table
"""

import sys

from omegaconf import DictConfig

from ipa.cli import command, quiet_libraries


@command(config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    from ipa.evaluation.run import evaluate  # imports torch, so only when there is something to evaluate

    quiet_libraries()
    try:
        evaluate(cfg)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where it was.", file=sys.stderr)
        sys.exit(130)  # as shells say it


if __name__ == "__main__":
    main()
