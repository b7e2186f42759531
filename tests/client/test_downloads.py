"""Downloads from servers that are slow, silent, late or wrong; what dead programs have left."""

import gzip
import io
import os
import socket
import subprocess
import sys
import threading
import time
import wave
import zipfile

import pytest
from comfyui_skyreels.wiro_api import files, parts
from comfyui_skyreels.wiro_api.errors import DownloadError
from comfyui_skyreels.wiro_api.files import LEAST_BYTES_PER_S, NOT_YET_S, download
from comfyui_skyreels.wiro_api.media import kind_of, what_is_missing
from comfyui_skyreels.wiro_api.task import Output
from support.clip import make_clip
from support.wiro_server import MP4

CLIP = make_clip()


def host_of(server) -> str:
    return server.url.removeprefix("http://").removesuffix("/v1")


def fetch(server, folder, name="0.mp4", kind="video/mp4", num_bytes=None, **keywords):
    output = Output(name, kind, server.file_url(name), num_bytes, "")
    keywords = {"sleep": lambda _: None, "local_host": host_of(server), "taskid": "77", **keywords}
    return download(output, folder, **keywords)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is whole ------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [1, 999, 1001, 2000, 10**30, -5, 0, None])
@pytest.mark.parametrize("content", [CLIP, MP4], ids=["container", "none that tells"])
def test_the_size_in_the_record_is_a_hint(server, tmp_path, caplog, content, told):
    server.files["0.mp4"] = content
    assert fetch(server, tmp_path, num_bytes=told).read_bytes() == content
    assert len(server.fetched) == 1, "nothing is fetched twice for it"
    is_possible = told is not None and told > 0 and told < 10**12
    assert caplog.text.count(f"where Wiro names {told}") == is_possible


@pytest.mark.parametrize("length", ["abc", "-1", "", "1e3", "²"])
def test_a_length_that_is_none_is_not_told(server, tmp_path, length):
    header = {"Content-Length": length.encode("utf-8").decode("latin-1")}
    server.files["0.mp4"] = CLIP
    server.fail("GET 0.mp4", *[("headers", header)] * 5)
    assert fetch(server, tmp_path).read_bytes() == CLIP


def test_content_that_was_packed_on_the_way_is_unpacked_in_bounds(server, tmp_path, monkeypatch):
    server.files["0.mp4"] = CLIP
    server.fail("GET 0.mp4", ("headers", {"Content-Encoding": "gzip"}))
    assert fetch(server, tmp_path).read_bytes() == CLIP
    server.files["0.mp4"] = CLIP + bytes(5_000_000)
    server.fail("GET 0.mp4", ("headers", {"Content-Encoding": "gzip"}))
    monkeypatch.setattr(files, "MAX_BYTES", 1_000_000)
    with pytest.raises(DownloadError, match="over 1000000 bytes"):
        fetch(server, tmp_path)
    assert names(tmp_path) == ["0.mp4"]


def box(kind: bytes, content: bytes = b"") -> bytes:
    return (len(content) + 8).to_bytes(4, "big") + kind + content


FTYP, MOOV, MDAT = box(b"ftyp", b"isom\0\0\2\0"), box(b"moov", b"x" * 64), box(b"mdat", b"y" * 500)


@pytest.mark.parametrize(
    ("content", "missing", "is_usable"),
    [
        (FTYP + MOOV + MDAT, "", True),
        (FTYP + MDAT + MOOV, "", True),
        (FTYP + MOOV + b"\0\0\0\0mdat" + b"y" * 100, "", True),  # to the end
        (FTYP + MOOV + b"\0\0\0\1mdat" + (516).to_bytes(8, "big") + b"y" * 500, "", True),
        (FTYP + MOOV + MDAT + bytes(100), "", True),
        (FTYP + MOOV + MDAT + b"\xff" * 100, "", True),  # something else behind it
        (FTYP + MOOV + MDAT[:-1], "ends inside its box 'mdat'", True),
        (FTYP + MOOV + MDAT[:20], "ends inside its box 'mdat'", True),
        (FTYP + MDAT[:-1], "ends inside its box 'mdat'", False),
        (FTYP + MDAT + MOOV[:-1], "ends inside its box 'moov'", False),
        (FTYP + MDAT, "without its index", False),
        (FTYP + bytes(1000), "without its index", False),
        (CLIP, "", True),
        (CLIP[:-1], "ends inside", False),
        (MP4, "", True),
        (b"RIFF" + (992).to_bytes(4, "little") + b"WAVE".ljust(992), "", True),
        (b"RIFF" + (992).to_bytes(4, "little") + b"WAVE".ljust(991), "ends after", True),
        (b"any text", "", True),
    ],
)
def test_a_container_tells_whether_it_is_whole(tmp_path, content, missing, is_usable):
    path = tmp_path / "x"
    path.write_bytes(content)
    told, usable = what_is_missing(path)
    assert (missing in told, bool(told), usable) == (True, bool(missing), is_usable)


def test_a_file_that_is_cut_at_the_server_is_kept_if_it_can_be_shown(server, tmp_path, caplog):
    server.files["0.mp4"] = FTYP + MOOV + MDAT[:-1]
    assert fetch(server, tmp_path).read_bytes() == server.files["0.mp4"]
    assert len(server.fetched) == 2, "it might have been the delivery"
    assert caplog.text.count("the file is kept") == 1


def test_a_file_that_is_cut_on_the_way_is_no_file(server, tmp_path):
    """Without a length, a connection that breaks looks like the end."""
    server.files["0.mp4"] = FTYP + MOOV + MDAT[:-1]
    server.fail("GET 0.mp4", *["unsized"] * 20)
    with pytest.raises(DownloadError, match="ends inside its box"):
        fetch(server, tmp_path)
    assert names(tmp_path) == []


def test_where_nothing_else_tells_the_record_is_asked_once(server, tmp_path, caplog):
    """A connection that ends without a length, and a file that does not know its end."""
    server.files["a.txt"] = b"a text"
    server.fail("GET a.txt", *["unsized"] * 20)
    assert fetch(server, tmp_path, "a.txt", "", 6).read_bytes() == b"a text"
    assert len(server.fetched) == 1
    assert fetch(server, tmp_path, "a.txt", "", 600).read_bytes() == b"a text"
    assert len(server.fetched) == 3
    assert caplog.text.count("6 bytes came where Wiro names 600; the file is kept") == 1


# --- whatever the model makes -------------------------------------------------------------------


def sound() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as made:
        made.setnchannels(1)
        made.setsampwidth(2)
        made.setframerate(8000)
        made.writeframes(bytes(1600))
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a.txt", "a")
    return file.getvalue()


def picture(form: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(file, form)
    return file.getvalue()


RESULTS = {
    "a.svg": ("image/svg+xml", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "text"),
    "a.webp": ("image/webp", picture("WEBP"), "image"),
    "a.png": ("image/png", picture("PNG"), "image"),
    "a.gif": ("image/gif", picture("GIF"), "image"),
    "a.wav": ("audio/wav", sound(), "audio"),
    "a.mp3": ("audio/mpeg", b"\xff\xfb\x90\x64" + bytes(400), "audio"),
    "a.zip": ("application/zip", archive(), "other"),
    "a.glb": ("model/gltf-binary", b"glTF\2\0\0\0" + bytes(20), "other"),
    "a.obj": ("", b"v 0 0 0\n", "text"),
    "a.json": ("application/json", b'{"a": 1}', "text"),
    "a.srt": ("text/plain", "1\n00:00 --> 00:01\nä\n".encode(), "text"),
    "a.html": ("text/html", b"<!doctype html><p>a page that was asked for", "text"),
    "a.bin": ("application/octet-stream", bytes(range(256)), "other"),
    "a.mp4": ("video/mp4", CLIP, "video"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_every_kind_of_file_is_kept_under_its_name(server, tmp_path, caplog, name):
    kind, content, found = RESULTS[name]
    server.files[name] = content
    path = fetch(server, tmp_path, name, kind)
    assert (path.name, path.read_bytes(), kind_of(path)) == (name, content, found)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"BM" + bytes(60), "image"), (b"BMW and others", "text"),
        (b"ID3\4\0\0", "audio"), (b"ID3v2 is a tag", "text"),
        (b"FORM\0\0\1\0AIFF", "audio"), (b"FORM of a letter", "text"),
        ("UTF-16".encode("utf-16"), "other"), (b"\xff\xf1\x50\x80", "audio"),
        (b"\xef\xbb\xbfa", "text"), (b"", "other"), (b"\0", "other"),
        (("ä" * 5000).encode(), "text"),
        (b"x" + "ä".encode() * 5000, "text"), (b"\x1b[31mred", "text"), (b"a\0b", "other"),
        (b"RIFF\0\0\0\0????", "other"), (b"\x1aE\xdf\xa3", "video"), (b"OggS", "audio"),
        (b"G".ljust(188) + b"G", "video"), (b"\0\0\0\x20ftypavif", "image"),
        (b"\0\0\0\x20ftypM4A ", "audio"), (b"\0\0\0\x20ftypisom", "video"),
    ],
)  # fmt: skip
def test_what_a_file_is_stands_in_its_first_bytes(tmp_path, content, kind):
    path = tmp_path / "x"
    path.write_bytes(content)
    assert kind_of(path) == kind


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a.wav", "a.mp4"])
@pytest.mark.parametrize(
    ("claim", "kind"), [("b.mp4", "video/mp4"), ("b.png", "image/png"), ("b.txt", "text/plain")]
)
def test_what_is_something_else_than_its_name_says_is_kept_and_told(
    server, tmp_path, caplog, name, claim, kind
):
    _, content, found = RESULTS[name]
    server.files[claim] = content
    assert fetch(server, tmp_path, claim, kind).read_bytes() == content
    is_other = not kind.startswith((found, "text"))
    assert caplog.text.count(f"announced as {kind.partition('/')[0]} and is {found}") == is_other


@pytest.mark.parametrize("page", [b"<html>sign in</html>", b"  <!DOCTYPE html><html>", b"<HTML>"])
@pytest.mark.parametrize(
    ("name", "kind"), [("0.mp4", "video/mp4"), ("0.png", "image/png"), ("0.wav", "")]
)
def test_a_page_in_place_of_the_file_is_not_the_file(server, tmp_path, page, name, kind):
    server.files[name] = page
    with pytest.raises(DownloadError, match="web page"):
        fetch(server, tmp_path, name, kind)
    assert names(tmp_path) == []


# --- slow and silent servers --------------------------------------------------------------------


class Racing:
    """A clock of which five hundred seconds pass in one."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self) -> float:
        return (time.monotonic() - self.start) * 500


@pytest.mark.parametrize("fault", [("drip", 0.05), ("stall", 60), ("silent", 60)])
def test_a_download_that_is_too_slow_is_given_up_in_bounded_time(server, tmp_path, fault):
    server.fail("GET 0.mp4", *[fault] * 100)
    with pytest.raises(DownloadError, match="too slowly|connection failed"):
        fetch(server, tmp_path, clock=Racing())
    assert names(tmp_path) == []
    assert len(server.fetched) < 5, "the attempts together have one bound"


def test_a_byte_in_each_attempt_is_too_slow_as_well(server, tmp_path, monkeypatch):
    server.ranges = True
    server.files["0.mp4"] = CLIP
    slept = []
    server.fail("GET 0.mp4", *[("stall", 0)] * 5000)
    original = files._pieces
    monkeypatch.setattr(files, "_pieces", lambda response: iter([next(original(response))[:1]]))
    with pytest.raises(DownloadError, match="too slowly"):
        fetch(server, tmp_path, sleep=slept.append)
    assert sum(slept) < 2 * files.BEHIND_S


def test_a_slow_download_that_keeps_the_least_speed_is_waited_for(server, tmp_path):
    """Twice the least speed by the clock that counts."""
    server.files["0.mp4"] = CLIP
    size = len(CLIP)
    seconds = size / LEAST_BYTES_PER_S / 2
    moments = iter(range(10**9))
    server.fail("GET 0.mp4", ("slow", 0.2))
    path = fetch(server, tmp_path, clock=lambda: next(moments) * seconds / 10**6, behind_s=1.0)
    assert path.read_bytes() == CLIP


@pytest.mark.parametrize("where", ["silent", "stall", "drip", "name", "connection"])
def test_a_stop_is_seen_while_a_server_is_silent(server, tmp_path, monkeypatch, where):
    """In whatever call the network hangs; it would hang for a minute."""
    monkeypatch.setattr(files, "TICK_S", 0.02)
    over = threading.Event()
    looks = []

    def check() -> None:
        looks.append(True)
        if len(looks) == 5:
            raise KeyboardInterrupt

    url = server.file_url("0.mp4")
    waiting = socket.create_server(("127.0.0.1", 0))  # accepts, and says nothing: TLS hangs
    if where in ("silent", "stall"):
        server.fail("GET 0.mp4", (where, 60))
    elif where == "drip":
        server.fail("GET 0.mp4", ("drip", 5))
    else:
        url = "https://cdn1.wiro.ai/0.mp4"

        def look_up(host, port, *_, **__):
            if where == "name":
                over.wait(60)
            address = waiting.getsockname()
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
    output = Output("0.mp4", "video/mp4", url, None, "")
    too_late = threading.Event()
    release = threading.Timer(25.0, too_late.set)  # less than the time-outs of the network
    release.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            download(output, tmp_path, local_host=host_of(server), check=check)
        assert not too_late.is_set(), "it waited for the network"
        assert names(tmp_path) == []
    finally:
        release.cancel()
        over.set()
        waiting.close()


def test_both_hooks_are_called_many_times_a_second(server, tmp_path, monkeypatch):
    assert files.TICK_S <= 0.1
    monkeypatch.setattr(files, "TICK_S", 0.01)
    server.fail("GET 0.mp4", ("silent", 60))
    calls = {"check": 0, "sleep": 0}

    def sleep(_: float) -> None:
        calls["sleep"] += 1
        if calls["sleep"] > 10:
            raise KeyboardInterrupt

    def check() -> None:
        calls["check"] += 1

    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path, sleep=sleep, check=check)
    assert calls["check"] >= 10


# --- late and broken deliveries -----------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 404])
def test_a_file_may_appear_a_minute_late(server, tmp_path, status):
    slept = []
    server.fail("GET 0.mp4", *[status] * len(NOT_YET_S))
    assert fetch(server, tmp_path, sleep=slept.append).read_bytes() == MP4
    assert sum(slept) == 60.0
    server.fail("GET 0.mp4", *[status] * 50)
    slept.clear()
    with pytest.raises(DownloadError, match=f"HTTP {status}"):
        fetch(server, tmp_path, sleep=slept.append)
    assert sum(slept) == 60.0
    server._faults.clear()
    server.fail("GET 0.mp4", status)
    with pytest.raises(DownloadError, match=f"HTTP {status}"):
        fetch(server, tmp_path, not_yet_s=())


def ranges_of(server) -> list[str]:
    return [headers.get("range", "") for headers in server.fetched]


@pytest.mark.parametrize("fault", ["cut", ("stall", 0)])
def test_an_interrupted_download_goes_on_where_it_was(server, tmp_path, fault):
    server.ranges, server.files["0.mp4"] = True, CLIP
    half = len(CLIP) // 2
    server.fail("GET 0.mp4", fault)
    seen = []
    path = fetch(server, tmp_path, on_bytes=lambda *numbers: seen.append(numbers))
    assert path.read_bytes() == CLIP
    assert ranges_of(server) == ["", f"bytes={half}-"]
    assert server.fetched[1]["if-range"].startswith('"')
    assert seen[-1] == (len(CLIP), len(CLIP))


def test_more_interruptions_than_attempts_are_lived_through_if_each_brings_something(
    server, tmp_path
):
    server.ranges, server.files["0.mp4"] = True, CLIP
    server.fail("GET 0.mp4", *["cut"] * 7)
    assert fetch(server, tmp_path).read_bytes() == CLIP


@pytest.mark.parametrize(
    ("second", "more"),
    [
        (("piece", 3), 1),  # a piece that nobody asked for
        (("headers", {"Content-Range": "bytes 0-9/10"}), 1),
        (("headers", {"Content-Range": "nonsense"}), 1),
        (("headers", {"ETag": '"another"'}), 1),
        (416, 1),
        ("changed", 0),
        ("no ranges", 0),
    ],
)
def test_a_piece_that_does_not_fit_is_fetched_from_the_start(server, tmp_path, second, more):
    server.ranges, server.files["0.mp4"] = True, CLIP
    other = make_clip(11)

    def change(*_: object) -> None:
        if len(server.fetched) == 1 and second == "changed":
            server.files["0.mp4"] = other
        elif len(server.fetched) == 1 and second == "no ranges":
            server.ranges = False

    server.fail("GET 0.mp4", "cut", *([] if isinstance(second, str) else [second]))
    content = fetch(server, tmp_path, sleep=change).read_bytes()
    assert content == (other if second == "changed" else CLIP)
    assert len(server.fetched) == 2 + more
    assert ranges_of(server)[-1] == ("" if more else f"bytes={len(CLIP) // 2}-")


def test_without_a_tag_or_a_date_nothing_is_put_together(server, tmp_path):
    server.files["0.mp4"] = CLIP
    server.fail("GET 0.mp4", "cut", "cut")
    assert fetch(server, tmp_path).read_bytes() == CLIP
    assert ranges_of(server) == ["", "", ""]
    server.fetched.clear()
    weak = ("headers", {"ETag": 'W/"1"'})
    server.fail("GET 0.mp4", weak)
    assert fetch(server, tmp_path).read_bytes() == CLIP


# --- what dead programs have left ---------------------------------------------------------------


def test_what_dead_programs_have_left_is_removed_and_what_live_ones_write_stays(
    server, tmp_path, monkeypatch
):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    live = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    parts = {
        "dead": f".wiro-{dead.pid}-0123456789ab.part",
        "live": f".wiro-{live.pid}-0123456789ab.part",
        "own": f".wiro-{os.getpid()}-0123456789ab.part",
        "own, of an earlier process": f".wiro-{os.getpid()}-0123456789ac.part",
        "absurd": f".wiro-{10**30}-0123456789ab.part",
        "another's": ".wiro-notes.part",
    }
    for name in parts.values():
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / parts["own, of an earlier process"], (1, 1))
    try:
        fetch(server, tmp_path)
    finally:
        live.communicate(b"\n")
    left = {name for name in parts.values() if (tmp_path / name).exists()}
    assert left == {parts["live"], parts["own"], parts["another's"]}


def test_downloads_of_one_process_leave_each_other_alone(server, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_BEGAN", time.time() + 3600)  # as on a disk whose clock is behind
    server.fail("GET 0.mp4", ("slow", 0.3))
    paths = []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch(server, tmp_path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in paths] == [MP4] * 4
    assert len(names(tmp_path)) == 4
    assert parts._own_parts == set()


def test_the_test_servers_packed_answer_is_what_it_says(server):
    """The fault is met: what goes over the wire is not the file."""
    import requests

    server.fail("GET 0.mp4", ("headers", {"Content-Encoding": "gzip"}))
    raw = requests.get(server.file_url("0.mp4"), stream=True).raw.read(decode_content=False)
    assert gzip.decompress(raw) == MP4
