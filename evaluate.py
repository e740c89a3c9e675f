"""Evaluate systems that take image prompts; `python evaluate.py --help` lists the options.

python evaluate.py adapter=demo/adapters/decoupled_global.safetensors        the embedded demo world
python evaluate.py -m 'method=glob(*)' benchmark=coco2017                    the paper's table
"""

from ipa.tools.evaluate import main

if __name__ == "__main__":
    main()
