"""Who may change what through the page's routes.

ComfyUI has no login, and its own origin check is off with --enable-cors-header and for every host
name but this machine's. So each request that changes something is checked here by its headers,
before its body is read: a browser sets them truthfully even for a malicious page. A hand-written
request can carry any header, so changing the key or raising a limit also takes proof of the key in
use, its last characters, and can be locked altogether.
"""

import hmac
import ipaddress
import math
import os
import socket
import threading
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

#: host names, separated by commas, under which the page is opened, such as a reverse proxy's
HOSTS_VARIABLE = "SKYREELS_WIRO_HOSTS"
#: header of the page's own GET requests
PAGE_HEADER = "X-SkyReels-Page"
#: anything but "", 0, no, off and false locks key and limits
LOCK_VARIABLE = "SKYREELS_WIRO_LOCKED"
#: last characters of the key that prove it is known
PROOF_LENGTH = 4
#: after so many wrong proofs within so many seconds all proofs are rejected
MAX_WRONG, WRONG_S = 5, 600.0

_wrong_at: list[float] = []
_lock = threading.Lock()


class ForbiddenError(Exception):
    """The request may not do that; the message says what is needed."""


# --- where a request comes from -----------------------------------------------------------------


def check_sender(headers: Iterable[tuple[str, str]]) -> None:
    """Check that a request comes from ComfyUI's own page.

    That is: Sec-Fetch-Site, if present, is same-origin; Origin equals Host, whatever the scheme,
    which a proxy may change; and Host is this machine, an IP address, or a name that the user has
    listed. Any other name may be an attacker's that resolves to this machine (DNS rebinding).
    X-Forwarded-... headers are ignored: a page can send them too.

    Args:
        headers: (name, value) pairs of the request.

    Raises:
        ForbiddenError: it does not.
    """
    values: dict[str, list[str]] = {}
    for name, value in headers:
        values.setdefault(name.lower(), []).append(value)
    origins, hosts = values.get("origin", []), values.get("host", [])
    sites = values.get("sec-fetch-site", [])
    if len(origins) != 1 or len(hosts) != 1:
        raise ForbiddenError(
            "The request must have one Origin and one Host header, as every browser sends: nothing "
            "was changed. Use ComfyUI's own page."
        )
    entries = os.environ.get(HOSTS_VARIABLE, "").split(",")
    listed = [split for entry in entries if (split := _split(entry))[0]]
    host, origin = _split(hosts[0]), _split(origins[0])
    is_web = origins[0].startswith(("http://", "https://"))
    default = 443 if origins[0].startswith("https:") else 80
    place = (origin[0], origin[1] or default)
    is_same = place == (host[0], host[1] or default)
    is_listed = any(name == place[0] and port in (None, place[1]) for name, port in listed)
    is_ours = is_web and bool(place[0]) and (is_same or is_listed)
    if not is_ours or any(site != "same-origin" for site in sites):
        raise ForbiddenError(
            f"The request comes from another page ({origins[0][:80]!r}, to {hosts[0][:80]!r}): "
            "nothing was changed. Use ComfyUI's own page. If this is it, behind a proxy, start "
            f"ComfyUI with {HOSTS_VARIABLE} set to the host and port in the browser's address bar."
        )
    if not (_is_this_machine(host[0]) or any(host[0] == name for name, _ in listed)):
        raise ForbiddenError(
            f"ComfyUI was opened as {host[0][:80]!r}, a host name that is not trusted: nothing was "
            f"changed. If it is yours, start ComfyUI with {HOSTS_VARIABLE}={host[0][:80]}, or open "
            "the page by IP address."
        )


def check_reader(headers: Iterable[tuple[str, str]]) -> None:
    """Check that a GET that makes the server ask Wiro comes from ComfyUI's own page.

    A browser sends no Origin with a page's own GET, nor with an image that a foreign page loads
    from here. So the page's own GETs carry `PAGE_HEADER`, which another page cannot add without a
    CORS preflight (ComfyUI never allows it, and then there is an Origin). The rest is as in
    `check_sender`.

    Args:
        headers: (name, value) pairs of the request.

    Raises:
        ForbiddenError: it does not.
    """
    given = list(headers)
    names = [name.lower() for name, _ in given]
    hosts = [value for name, value in given if name.lower() == "host"]
    if PAGE_HEADER.lower() not in names or len(hosts) != 1:
        raise ForbiddenError(
            f"The request is not from ComfyUI's own page (no {PAGE_HEADER} or no Host header), so "
            "Wiro was not asked. Reload the page."
        )
    if "origin" not in names:
        given.append(("Origin", f"http://{hosts[0]}"))
    check_sender(given)


def _split(address: str) -> tuple[str, int | None]:
    """Host and port of "host", "host:port" or a URL; ("", None) for anything else."""
    try:
        parts = urlsplit(address.strip() if "//" in address else f"//{address.strip()}")
        if parts.username is not None or parts.password is not None:
            return "", None
        return parts.hostname or "", parts.port
    except ValueError:
        return "", None


def _is_this_machine(name: str) -> bool:
    """Whether it is an IP address, or a name that no other machine on the internet can have."""
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        own = socket.gethostname().lower() or "localhost"
        return name in ("localhost", own, f"{own}.local") or name.endswith(".localhost")


# --- what may be changed ------------------------------------------------------------------------


def is_locked() -> bool:
    """Whether the key and the limits are locked."""
    value = os.environ.get(LOCK_VARIABLE, "").strip().lower()
    return value not in ("", "0", "no", "off", "false")


def check_unlocked() -> None:
    """Check that the page may change the key and the limits.

    Raises:
        ForbiddenError: they are locked.
    """
    if is_locked():
        raise ForbiddenError(
            f"The key and the limits of this server are locked ({LOCK_VARIABLE} is set in the "
            "environment of ComfyUI): nothing was changed. Unset it to change them."
        )


def check_proof(proof: str, api_key: str) -> None:
    """Check that the sender knows the key in use, by its last characters.

    Args:
        proof: what was typed.
        api_key: the key in use.

    Raises:
        ForbiddenError: missing or wrong, or there were too many wrong ones.
    """
    fix = (
        f"Type the last {PROOF_LENGTH} characters of the key in use. If you no longer have it, set "
        "WIRO_API_KEY in the environment of ComfyUI."
    )
    if not proof:
        raise ForbiddenError(
            f"Replacing or removing the key, and raising a limit, takes proof of the key. {fix}"
        )
    with _lock:
        now = time.monotonic()
        _wrong_at[:] = [moment for moment in _wrong_at if now - moment < WRONG_S]
        if len(_wrong_at) >= MAX_WRONG:
            left = WRONG_S - (now - _wrong_at[0])
            raise ForbiddenError(
                f"{MAX_WRONG} wrong attempts: locked for {math.ceil(left / 60)} minutes. Nothing "
                "was changed. Wait, or restart ComfyUI."
            )
        given, expected = proof.encode(errors="replace"), api_key[-PROOF_LENGTH:].encode()
        if not hmac.compare_digest(given, expected):
            _wrong_at.append(now)
            raise ForbiddenError(
                f"These are not the last characters of the key: nothing was changed. {fix}"
            )
        _wrong_at.clear()
