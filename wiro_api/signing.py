"""Who is asking: credentials, nonces and the signature.

    message     = secret + nonce                     (UTF-8, no separator, no newline)
    x-signature = hex(HMAC-SHA256(key = API key, message))

The roles are unusual (the secret is in the message, the key travels in clear), and method, path and
body are not signed. A project without a secret sends the key alone. Every attempt, retries
included, has a nonce of its own.

Source: the API sample on the model page of wiro/SkyReels-V1, 2025-03-13.
"""

import hashlib
import hmac
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import requests

from .errors import ConfigError
from .parts import write_whole

KEY_VARIABLE = "WIRO_API_KEY"
SECRET_VARIABLE = "WIRO_API_SECRET"
#: of a nonce, behind its 13 digits of milliseconds
OWN_DIGITS = 6
HOW_TO_SET = (
    f"set {KEY_VARIABLE} (and {SECRET_VARIABLE} for a project with signature) in the environment; "
    "the key is on the project's page in the Wiro dashboard"
)


@dataclass(frozen=True)
class Credentials:
    """An API key and, for projects with signature, its secret; neither is ever shown."""

    api_key: str = field(repr=False)
    api_secret: str = field(default="", repr=False)


def account_of(credentials: Credentials) -> str:
    """A short digest of the key, by which rows of one journal are told apart; not the key."""
    return hashlib.sha256(f"wiro account {credentials.api_key}".encode()).hexdigest()[:16]


def load_credentials(
    environment: Mapping[str, str] = os.environ,
    file: Path | None = None,
    how_to_set: str = HOW_TO_SET,
) -> Credentials:
    """Load key and secret from the environment, else from a file.

    Blanks and one pair of quotes around them are taken off: shells and Windows dialogs leave them.

    Args:
        environment: where WIRO_API_KEY and WIRO_API_SECRET are looked for.
        file: lines NAME=VALUE with the same names, as `save_credentials` writes it.
        how_to_set: what a message advises.

    Returns:
        Both; the secret may be "".

    Raises:
        ConfigError: no key, or one with characters no header can carry.
    """
    values = dict(environment)
    if not _trimmed(values.get(KEY_VARIABLE, "")) and file is not None and file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition("=")
            values[name.strip()] = value
    api_key = _trimmed(values.get(KEY_VARIABLE, ""))
    api_secret = _trimmed(values.get(SECRET_VARIABLE, ""))
    if not api_key:
        raise ConfigError(f"There is no Wiro API key: {how_to_set}.")
    for words, value in (("key", api_key), ("secret", api_secret)):
        if not value.isascii() or not value.isprintable() or " " in value:
            raise ConfigError(
                f"The API {words} holds a blank or a character no key has: copy it again; "
                f"{how_to_set}."
            )
    return Credentials(api_key, api_secret)


def _trimmed(value: str) -> str:
    value = value.strip()
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1].strip()
    return value


def save_credentials(file: Path, credentials: Credentials) -> None:
    """Write both to a file that only its owner can read; it replaces the old one as a whole."""
    text = f"{KEY_VARIABLE}={credentials.api_key}\n{SECRET_VARIABLE}={credentials.api_secret}\n"
    write_whole(file, text, 0o600)


def sign(api_key: str, api_secret: str, nonce: str) -> str:
    """The value of x-signature: 64 lowercase hex digits."""
    message = (api_secret + nonce).encode()
    return hmac.new(api_key.encode(), message, hashlib.sha256).hexdigest()


class Nonces:
    """Decimal numbers that never repeat and never fall, in all threads of a process.

    Unix milliseconds, then digits of this source alone: two processes on one key may ask in the
    same millisecond. Both together fit a signed integer of 64 bits.
    """

    def __init__(self, now_s: Callable[[], float] = time.time) -> None:
        self._now_s = now_s
        self._last = 0
        self._lock = threading.Lock()
        self._process, self._digits = os.getpid(), _random_digits()

    def next(self) -> str:
        """The next one."""
        with self._lock:
            if self._process != os.getpid():  # a copy of the process that made it
                self._process, self._digits = os.getpid(), _random_digits()
            self._last = max(self._last + 1, int(self._now_s() * 1000))
            return f"{self._last}{self._digits:0{OWN_DIGITS}}"


def _random_digits() -> int:
    return secrets.randbelow(10**OWN_DIGITS)


@lru_cache(maxsize=8)
def nonces_of(now_s: Callable[[], float]) -> Nonces:
    """The one source of nonces of a clock: clients of a process that share a clock share it too."""
    return Nonces(now_s)


class WiroAuth(requests.auth.AuthBase):
    """Puts the headers of one attempt on a request."""

    def __init__(self, credentials: Credentials, nonces: Nonces) -> None:
        self._credentials, self._nonces = credentials, nonces

    @property
    def secrets(self) -> tuple[str, str]:
        """What no message may hold."""
        return self._credentials.api_key, self._credentials.api_secret

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Sign a request, with a new nonce."""
        request.headers["x-api-key"] = self._credentials.api_key
        if self._credentials.api_secret:
            nonce = self._nonces.next()
            request.headers["x-nonce"] = nonce
            request.headers["x-signature"] = sign(
                self._credentials.api_key, self._credentials.api_secret, nonce
            )
        return request
