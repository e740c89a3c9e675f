"""Spend the cost of the frozen encoders once: shards in, feature shards out.

    python -m ipa.tools.precompute recipe=sd15 data.train=/data/laion out=/data/laion-sd15
    python train.py recipe=sd15 data=cache data.train=/data/laion-sd15

Takes the configuration of train.py. Any number of processes on any number of machines can run the same command: each
shard is made by one of them, and the command again makes what is missing. What is in a shard: ``ipa.data.cache``.
"""

from omegaconf import DictConfig

from ipa.cli import command, quiet_libraries


@command(config_path="../../conf", config_name="precompute")
def main(cfg: DictConfig) -> None:
    from ipa.tools.precomputing.run import precompute  # imports torch, so only when there is something to make

    quiet_libraries()
    precompute(cfg)


if __name__ == "__main__":
    main()
