"""Every claim of the paper in miniature: `make paper`, or ``python -m demo.paper`` from the root of the repository.

``sections`` says what is claimed and what is measured for it, ``plan`` which trainings that needs, ``running`` runs
them, ``measuring`` draws and scores images, ``claims`` turns scores into intervals and verdicts, ``page`` writes.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
# the scripts of the demo world import each other by name
sys.path.append(str(DEMO))
