"""Where results may be fetched from: proved by TLS, by the proxy, or by the connection itself."""

import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager

import pytest
from comfyui_skyreels.wiro_api.addresses import (
    RefusedAddressError,
    is_public,
    must_be_public,
    parse_ip,
    service_domain,
)
from comfyui_skyreels.wiro_api.errors import DownloadError
from comfyui_skyreels.wiro_api.files import download
from comfyui_skyreels.wiro_api.task import Output
from support.wiro_server import MP4

WIRO = "https://api.wiro.ai/v1"
#: every spelling of an address that leads nowhere public
SPELLINGS = """
127.0.0.1 10.0.0.1 10.255.1.2 172.16.0.1 172.31.9.9 192.168.1.1 100.64.0.1 100.100.100.200
198.18.0.5 198.19.255.1 169.254.169.254 169.254.0.1 0.0.0.0 0.1.2.3 255.255.255.255 240.0.0.1
224.0.0.1 192.0.0.192 192.0.2.1 168.63.129.16 127.0.0.1. 0x7f.1 0x7f.0.0.1 0X7F.0.0.1 2130706433
017700000001 0177.0.0.1 0177.1 127.1 127.0.1 0x7f000001 0xa9fea9fe 2852039166 0251.0376.0251.0376
1.2.3.4.5 256.1.1.1 0x 127.0.0.08
[::1] [::] [::ffff:127.0.0.1] [::ffff:10.0.0.1] [::ffff:a9fe:a9fe] [::127.0.0.1] [::7f00:1]
[fe80::1] [fe80::1%25eth0] [fec0::1] [fc00::1] [fd00:ec2::254] [ff02::1] [2001:db8::1]
[64:ff9b::7f00:1] [64:ff9b::10.0.0.1] [64:ff9b::a9fe:a9fe] [64:ff9b:1::a00:1] [2002:7f00:1::]
[2002:a00:1::1] [2002:c0a8:101::1] [2001:0:4136:e378:8000:63bf:3fff:fdd2] [100::1]
localhost localhost. LOCALHOST a.localhost localhost.localdomain printer.local printer
metadata.google.internal metadata router.home.arpa ip6-localhost
"""
PRIVATE = SPELLINGS.split()
#: as requests hands them on, these are written with other letters
STRANGE = [
    "127\u30020\u30020\u30021",
    "\uff11\uff12\uff17.0.0.1",
    "\u2460\u2461\u2466.0.0.1",
    "127%2e0%2e0%2e1",
    "cdn1.wiro.ai%00.x.org",
]


@pytest.mark.parametrize("proxy", ["", "http://proxy.example:3128"])
@pytest.mark.parametrize("service", ["wiro.ai", "gateway.corp.example"])
def test_no_spelling_of_a_private_address_is_fetched_from(service, proxy):
    for host in PRIVATE:
        for url in (f"https://{host}/x", f"https://{host}:8443/x"):
            with pytest.raises(RefusedAddressError, match="not a public address"):
                must_be_public(url, service=service, proxy=proxy)


def test_nor_by_a_download_or_a_redirect(server, tmp_path):
    for host in (*PRIVATE, *STRANGE):
        direct = Output("0.mp4", "video/mp4", f"https://{host}/x", None, "")
        with pytest.raises(DownloadError, match="not a public address|the download URL is invalid"):
            download(direct, tmp_path, sleep=lambda _: None)
        server.fail("GET 0.mp4", ("redirect", ascii(direct.url)[1:-1]))
        redirected = Output("0.mp4", "video/mp4", server.file_url("0.mp4"), None, "")
        with pytest.raises(DownloadError, match="not a public address|the download URL is invalid"):
            download(redirected, tmp_path, sleep=lambda _: None, local_host=host_of(server))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    ["http://cdn1.wiro.ai/x", "ftp://cdn1.wiro.ai/x", "https://user@cdn1.wiro.ai/x",
     "https://a:b@cdn1.wiro.ai/", "https:///x", "//cdn1.wiro.ai/x",
     "https://cdn1.wiro.ai\\@127.0.0.1/x", "https://127.0.0.1\\@cdn1.wiro.ai/x",
     "https://cdn1.wiro.ai:99999/x", "https://[::1/x"],
)  # fmt: skip
def test_only_plain_https_addresses_are_read(url):
    with pytest.raises(RefusedAddressError):
        must_be_public(url, service="wiro.ai")


@pytest.mark.parametrize(
    ("host", "service", "proxy", "expected"),
    [
        ("cdn1.wiro.ai", "wiro.ai", "", False), ("wiro.ai", "wiro.ai", "", False),
        ("CDN1.WIRO.AI.", "wiro.ai", "", False),
        ("evilwiro.ai", "wiro.ai", "", True), ("wiro.ai.evil.org", "wiro.ai", "", True),
        ("cdn1.wiro.ai", "gateway.corp.example", "", True),
        ("gateway.corp.example", "gateway.corp.example", "", False),
        ("files.gateway.corp.example", "gateway.corp.example", "", False),
        ("gateway", "gateway", "", False), ("box.internal", "box.internal", "", False),
        ("10.0.0.5", "10.0.0.5", "", False),  # a gateway that the user has named
        ("storage.example.org", "wiro.ai", "", True), ("8.8.8.8", "wiro.ai", "", True),
        ("[2606:4700::1111]", "wiro.ai", "", True),
        ("storage.example.org", "wiro.ai", "http://proxy:3128", False),
        ("8.8.8.8", "wiro.ai", "socks5h://proxy:1080", False),
    ],
)  # fmt: skip
def test_foreign_hosts_alone_must_be_met_at_public_addresses(host, service, proxy, expected):
    assert must_be_public(f"https://{host}/x", service=service, proxy=proxy) is expected


def test_the_service_is_its_registered_name_and_never_this_machine():
    assert service_domain(WIRO) == service_domain("https://wiro.ai") == "wiro.ai"
    assert service_domain("https://Gateway.corp.example:8443/v1") == "gateway.corp.example"
    assert service_domain("https://evilwiro.ai/v1") == "evilwiro.ai"
    for local in ("http://127.0.0.1:80/v1", "https://localhost/v1", "https://[::1]/v1",
                  "https://a.localhost./v1"):  # fmt: skip
        assert service_domain(local) == ""


def test_addresses_that_hold_public_ones_are_public():
    for text in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(parse_ip(text)), text
    assert parse_ip("example.org") is parse_ip("1.2.3.4.org") is None
    assert str(parse_ip("0x8.8.2056")) == "8.8.8.8"


# --- connections --------------------------------------------------------------------------------


def host_of(server) -> str:
    return server.url.removeprefix("http://").removesuffix("/v1")


@contextmanager
def listener(answer=b""):
    """A port of this machine; what is sent to it, and how often it was called."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(5)
                    try:
                        received.append(connection.recv(4096))
                        connection.sendall(answer)
                    except OSError:
                        received.append(b"")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1], received
        finally:
            over.set()
            thread.join()


@pytest.fixture
def names(monkeypatch):
    """A name server in a test's hand: host -> its (address, port); and what was asked."""
    asked: list[str] = []
    answers: dict[str, tuple[str, int]] = {}
    original = socket.getaddrinfo

    def look_up(host, port, *arguments, **options):
        host = host.decode() if isinstance(host, bytes) else host
        if host not in answers:
            return original(host, port, *arguments, **options)
        asked.append(host)
        address, to_port = answers[host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, to_port or port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY",
                     "no_proxy", "REQUESTS_CA_BUNDLE"):  # fmt: skip
        monkeypatch.delenv(variable, raising=False)
    return answers, asked


def fetch(host, folder, **keywords):
    output = Output("0.mp4", "video/mp4", f"https://{host}/0.mp4", None, "")
    return download(output, folder, sleep=lambda _: None, taskid="77", **keywords)


def test_the_services_own_hosts_are_asked_wherever_names_lead(names, tmp_path):
    with listener() as (port, received):
        names[0]["cdn1.wiro.ai"] = ("127.0.0.1", port)
        with pytest.raises(DownloadError, match="connection failed"):
            fetch("cdn1.wiro.ai", tmp_path)
    assert received[0][:1] == b"\x16", "TLS has begun: it is what proves the host"


def test_a_foreign_host_at_a_private_address_is_sent_nothing(names, tmp_path):
    with listener() as (port, received):
        names[0]["storage.example.org"] = ("127.0.0.1", port)
        with pytest.raises(DownloadError, match="storage.example.org is not a public address"):
            fetch("storage.example.org", tmp_path)
    assert b"".join(received) == b""


def test_a_name_that_leads_elsewhere_the_second_time_is_sent_nothing(names, tmp_path, monkeypatch):
    """What was asked before the connection says nothing of the connection."""
    look_up = socket.getaddrinfo

    def rebind(host, port, *arguments, **options):
        if host == "storage.example.org" and "type" in options:  # asked ahead
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", port))]
        return look_up(host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    with listener() as (port, received):
        names[0]["storage.example.org"] = ("127.0.0.1", port)
        with pytest.raises(DownloadError, match="not a public address"):
            fetch("storage.example.org", tmp_path)
    assert b"".join(received) == b""


@pytest.mark.parametrize("host", ["cdn1.wiro.ai", "storage.example.org"])
def test_where_a_proxy_applies_it_is_the_proxy_that_looks_names_up(
    names, tmp_path, monkeypatch, host
):
    refusal = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"
    with listener(refusal) as (port, received):
        names[0][host] = ("10.0.0.1", 0)
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        words = f"proxy 127.0.0.1:{port} could not be used.*NO_PROXY"
        with pytest.raises(DownloadError, match=words):
            fetch(host, tmp_path)
        assert received[0].startswith(f"CONNECT {host}:443 ".encode())
        assert host not in names[1]
        monkeypatch.setenv("NO_PROXY", host)
        names[0][host] = ("127.0.0.1", port)
        words = "connection failed" if host == "cdn1.wiro.ai" else "not a public address"
        with pytest.raises(DownloadError, match=words):
            fetch(host, tmp_path)
        assert host in names[1], "the proxy does not apply: it is looked up here"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_file_comes_from_behind_a_name_server_that_makes_addresses_up(
    names, tmp_path, monkeypatch
):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key,
         "-out", certificate, "-subj", "/CN=cdn1.wiro.ai", "-addext",
         "subjectAltName=DNS:cdn1.wiro.ai,DNS:storage.example.org"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n" + MP4
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with context.wrap_socket(connection, server_side=True) as secure:
                secure.recv(4096)
                secure.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        names[0]["cdn1.wiro.ai"] = ("127.0.0.1", server.getsockname()[1])
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert fetch("cdn1.wiro.ai", tmp_path / "out").read_bytes() == MP4
        thread.join()
