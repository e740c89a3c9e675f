"""Train an IP-Adapter. `python train.py --help` explains the options.

python train.py experiment=decoupled_global                 the embedded demo world: minutes on a CPU, no downloads
python train.py experiment=decoupled_global recipe=sd15     the same ablation on Stable Diffusion 1.5
"""

from ipa.tools.train import main

if __name__ == "__main__":
    main()
