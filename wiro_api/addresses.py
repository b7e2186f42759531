"""Which addresses a result may be fetched from, and connections that hold to it.

An address comes from outside. TLS proves hosts of the service itself, and where a proxy applies it
is the proxy that looks names up: there a private answer of the name server means nothing, as with
split or made-up (198.18/15) answers. Any other host must be met at a public address, which is asked
of the connection itself: a second look-up may answer differently.
"""

import ipaddress
import re
import socket
import unicodedata
from typing import Any
from urllib.parse import urlsplit

import requests.adapters
import urllib3
from urllib3.connection import HTTPSConnection
from urllib3.connectionpool import HTTPSConnectionPool

from .transport import LOOPBACK

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
#: a service is its registered name and all below it, not the one host of the API
SERVICE = "wiro.ai"
#: hands out the secrets of a machine at Azure; the other clouds' are link-local or private
_METADATA = (ipaddress.ip_address("168.63.129.16"),)
#: private by the registries of IANA, and public to the tables of older Pythons
_PRIVATE = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "64:ff9b:1::/48", "2001::/23", "3fff::/20", "5f00::/16"),
    )
)
_LOCAL_NAMES = re.compile(
    r"(.*\.)?(localhost|localdomain|local|internal|home\.arpa)|localhost[46]|ip6-.*|[^.]*"
)
#: of addresses that hold an IPv4 address, where it stands
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


class RefusedAddressError(Exception):
    """An address that is not fetched from; trying again does not help."""


def service_domain(base_url: str) -> str:
    """The name that the service's own hosts end with, of its base address; "" for this machine."""
    host = (urlsplit(base_url).hostname or "").rstrip(".")
    if host in LOOPBACK or host.endswith(".localhost"):
        return ""
    return SERVICE if host == SERVICE or host.endswith("." + SERVICE) else host


def must_be_public(url: str, *, service: str = "", local_host: str = "", proxy: str = "") -> bool:
    """Judge an address before anything is looked up.

    Args:
        url: as requests has prepared it.
        service: of `service_domain`.
        local_host: "host:port" of a test server on this machine.
        proxy: that applies to the address, "" if none does.

    Returns:
        Whether the connection must be to a public address: whether it is made to a foreign host
        from here.

    Raises:
        RefusedAddressError: it is never fetched from.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
        # two readings of one address have opened many a door
        same = (urllib3.util.parse_url(url).host or "").strip("[]").lower() == host
    except (ValueError, urllib3.exceptions.LocationParseError):
        raise RefusedAddressError("the download URL is invalid") from None
    if local_host and parts.netloc == local_host and host in LOOPBACK:
        return False
    if parts.scheme != "https" or not host or parts.username or parts.password:
        raise RefusedAddressError(
            f"the download URL is {parts.scheme or 'without scheme'}: only https is fetched"
        )
    shown = ascii(host)[1:-1][:100]
    plain = host.rstrip(".")
    address = parse_ip(plain)
    if address is not None and not is_public(address) and host != service:
        raise RefusedAddressError(f"{shown} is not a public address")
    if not same or (address is None and not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", plain)):
        raise RefusedAddressError(f"{shown} is not a public address: it is not written plainly")
    if service and address is None and (plain == service or plain.endswith("." + service)):
        return False
    if address is None and _LOCAL_NAMES.fullmatch(plain):
        raise RefusedAddressError(f"{shown} is not a public address")
    return not proxy and host != service


def parse_ip(host: str) -> IPAddress | None:
    """Parse a host as an IP address, in any spelling that a system accepts.

    Returns:
        The address, or None for a name.

    Raises:
        RefusedAddressError: it looks like an address and is not a valid one.
    """
    # "1２7。0。0。1": what name look-ups make of letters from elsewhere
    host = unicodedata.normalize("NFKC", host).replace("\u3002", ".").partition("%")[0]
    host = host.strip("[]").rstrip(".")
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    labels = host.split(".")
    if not re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        return None
    try:
        # 0x7f.1, 017700000001, 2130706433: as the C library reads them
        *high, low = map(_parse_number, labels)
    except ValueError:
        high, low = [], 256**4
    if len(high) > 3 or any(number > 255 for number in high) or low >= 256 ** (4 - len(high)):
        raise RefusedAddressError(f"{ascii(host)[1:-1][:100]} is not a public address")
    whole = low + sum(number << (24 - 8 * place) for place, number in enumerate(high))
    return ipaddress.IPv4Address(whole)


def _parse_number(label: str) -> int:
    if label.startswith("0x"):
        return int(label[2:] or "0", 16)
    return int(label, 8 if label.startswith("0") else 10)


def is_public(address: IPAddress) -> bool:
    """Whether it leads out of every private network, also if it holds another address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and (address in _NAT64 or address in _COMPATIBLE):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local or address.teredo:
            return False
    is_private = address in _METADATA or any(address in network for network in _PRIVATE)
    return address.is_global and not address.is_multicast and not is_private


class _PublicConnection(HTTPSConnection):
    """A connection that is closed before a byte is sent if it leads into a private network."""

    def _new_conn(self) -> socket.socket:
        connected: socket.socket = super()._new_conn()
        peer = str(connected.getpeername()[0]).partition("%")[0]
        if not is_public(ipaddress.ip_address(peer)):
            connected.close()
            raise RefusedAddressError(f"{self.host} is not a public address")
        return connected


class _PublicPool(HTTPSConnectionPool):
    ConnectionCls = _PublicConnection


class PublicAdapter(requests.adapters.HTTPAdapter):
    """Sends requests to public addresses only."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Make the pools, of connections that look where they lead."""
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"https": _PublicPool}
