"""Precompute VAE latents and CLIP features: shards of pictures in, feature shards out.

    python -m ipa.tools.precompute recipe=sd15 data.train=/data/laion out=/data/laion-sd15
    python train.py recipe=sd15 data=cache data.train=/data/laion-sd15

Takes the configuration of train.py. The same command resumes and makes only what is missing. Several processes, started
by torchrun or Slurm or with rank= and world=, divide the shards. The format is described in ``ipa.data.cache``.
"""

from omegaconf import DictConfig

from ipa.cli import command, quiet_libraries


@command("precompute")
def main(cfg: DictConfig) -> None:
    from ipa.tools.precompute.run import precompute  # imports torch, which --help and typos do not need

    quiet_libraries()
    precompute(cfg)


if __name__ == "__main__":
    main()
