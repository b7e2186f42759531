"""What `python -m wiro_api` imports on its way to a file: for `support.forked.forks`."""

import av  # noqa: F401
import numpy  # noqa: F401
import requests  # noqa: F401
import websocket  # noqa: F401

from wiro_api import cli, jobs, state, video  # noqa: F401
