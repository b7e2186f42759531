"""Entry point of `python -m skyreels`."""

import sys

from .cli import main

sys.exit(main())
