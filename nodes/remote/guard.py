"""Who may change what through the page's routes.

ComfyUI has no login, and its own check of where a request comes from is off with
--enable-cors-header and for every name but this machine's. So each request that changes something
is judged here by its headers alone, before its body is read: a browser tells the truth in them even
where the page that sends it lies. Whoever writes a request by hand can write any header: what costs
money or gives it away wants a proof besides, the last characters of the key in use, and can be
frozen altogether.
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

#: names, separated by commas, under which the page is opened: of a reverse proxy, for example
HOSTS_VARIABLE = "SKYREELS_WIRO_HOSTS"
#: header of the page's own questions
PAGE_HEADER = "X-SkyReels-Page"
#: anything but "", 0, no, off and false freezes key and limits
LOCK_VARIABLE = "SKYREELS_WIRO_LOCKED"
#: characters of the key that prove it is known
PROOF_LETTERS = 4
#: wrong proofs, within so many seconds of the first, after which none is looked at
MAX_WRONG, WRONG_S = 5, 600.0

_wrong_at: list[float] = []
_lock = threading.Lock()


class ForbiddenError(Exception):
    """It may not be changed by this request; the sentence says what would be needed."""


# --- where a request comes from -----------------------------------------------------------------


def check_sender(headers: Iterable[tuple[str, str]]) -> None:
    """Nothing if a request comes from ComfyUI's own page.

    That is: the browser calls it same-origin, if it says; its Origin is the address that was asked
    (Host), whatever the scheme, which a proxy may change; and that address is this machine, a
    number, or a name that the user has listed. A name that is not listed may be anybody's who lets
    it point here (DNS rebinding). What proxies add (X-Forwarded-...) is not looked at: a page can
    send it too.

    Raises:
        ForbiddenError: otherwise.
    """
    values: dict[str, list[str]] = {}
    for name, value in headers:
        values.setdefault(name.lower(), []).append(value)
    origins, hosts = values.get("origin", []), values.get("host", [])
    sites = values.get("sec-fetch-site", [])
    if len(origins) != 1 or len(hosts) != 1:
        raise ForbiddenError(
            "The request does not tell where it comes from (Origin and Host, once each), as every "
            "browser does: nothing was changed. Use ComfyUI's own page."
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
            f"ComfyUI with {HOSTS_VARIABLE} set to the name and port in the browser's address."
        )
    if not (_is_this_machine(host[0]) or any(host[0] == name for name, _ in listed)):
        raise ForbiddenError(
            f"ComfyUI was opened as {host[0][:80]!r}, a name that anybody could let point here: "
            f"nothing was changed. If it is yours, start ComfyUI with {HOSTS_VARIABLE}="
            f"{host[0][:80]}, or open the page by the machine's number."
        )


def check_reader(headers: Iterable[tuple[str, str]]) -> None:
    """Nothing if a question that is put to the service comes from ComfyUI's own page.

    A browser sends no Origin with a page's own GET, nor with a picture that a foreign page wants to
    load from here. So the page's own ones carry `PAGE_HEADER`, which no other page can add without
    asking (ComfyUI never allows it, and then there is an Origin); the rest is as for what changes
    something.

    Raises:
        ForbiddenError: otherwise.
    """
    given = list(headers)
    names = [name.lower() for name, _ in given]
    hosts = [value for name, value in given if name.lower() == "host"]
    if PAGE_HEADER.lower() not in names or len(hosts) != 1:
        raise ForbiddenError(
            f"The request is not of ComfyUI's own page (no {PAGE_HEADER}, or no Host), so Wiro was "
            "not asked. Reload the page."
        )
    if "origin" not in names:
        given.append(("Origin", f"http://{hosts[0]}"))
    check_sender(given)


def _split(address: str) -> tuple[str, int | None]:
    """Name and port of "name", "name:port" or an address with a scheme; ("", None) if neither."""
    try:
        parts = urlsplit(address.strip() if "//" in address else f"//{address.strip()}")
        if parts.username is not None or parts.password is not None:
            return "", None
        return parts.hostname or "", parts.port
    except ValueError:
        return "", None


def _is_this_machine(name: str) -> bool:
    """A number, or a name that no other machine on the internet can have."""
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        own = socket.gethostname().lower() or "localhost"
        return name in ("localhost", own, f"{own}.local") or name.endswith(".localhost")


# --- what may be changed ------------------------------------------------------------------------


def is_locked() -> bool:
    """Whether the key and the limits are frozen."""
    value = os.environ.get(LOCK_VARIABLE, "").strip().lower()
    return value not in ("", "0", "no", "off", "false")


def check_unlocked() -> None:
    """Nothing if the key and the limits may be changed by the page.

    Raises:
        ForbiddenError: they are frozen.
    """
    if is_locked():
        raise ForbiddenError(
            f"The key and the limits of this server are frozen ({LOCK_VARIABLE} is set in the "
            "environment of ComfyUI): nothing was changed. Change them there."
        )


def check_proof(proof: str, api_key: str) -> None:
    """Nothing if somebody who asks knows the key in use, by its last characters.

    Raises:
        ForbiddenError: missing, wrong, or there were too many wrong ones.
    """
    fix = (
        f"Type the last {PROOF_LETTERS} characters of the key in use; who does not have it any "
        "more sets WIRO_API_KEY in the environment of ComfyUI."
    )
    if not proof:
        raise ForbiddenError(
            f"To replace or remove the key, or to allow more spending, it must be known. {fix}"
        )
    with _lock:
        now = time.monotonic()
        _wrong_at[:] = [moment for moment in _wrong_at if now - moment < WRONG_S]
        if len(_wrong_at) >= MAX_WRONG:
            left = WRONG_S - (now - _wrong_at[0])
            raise ForbiddenError(
                f"There were {MAX_WRONG} wrong tries: none is looked at for {math.ceil(left / 60)} "
                "minutes. Nothing was changed. Wait, or restart ComfyUI."
            )
        given, end = proof.encode(errors="replace"), api_key[-PROOF_LETTERS:].encode()
        if not hmac.compare_digest(given, end):
            _wrong_at.append(now)
            raise ForbiddenError(f"That is not the end of the key: nothing was changed. {fix}")
        _wrong_at.clear()
