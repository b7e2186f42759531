"""How the built-in model was made: procedural clips, a VAE, text encoders and a transformer.

Run as `python -m tests.train.vae`, `.text`, `.transformer`, `.export` from the repository's root;
see README.md of the exported folder (written by export.py) for the order and the hours.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
