"""Downloads: whole or not at all, from allowed addresses only, under harmless names."""

from dataclasses import replace

import pytest
from comfyui_skyreels.wiro_api import files
from comfyui_skyreels.wiro_api.errors import DownloadError
from comfyui_skyreels.wiro_api.files import download, is_name_of, label_of, safe_name
from comfyui_skyreels.wiro_api.task import Output, parse_task
from support.wiro_server import MP4


def result(server, name: str = "0.mp4", num_bytes: int | None = 1000) -> Output:
    return Output(name, "video/mp4", server.file_url("0.mp4"), num_bytes, "")


def fetch(server, folder, output=None, **keywords):
    host = server.url.removeprefix("http://").removesuffix("/v1")
    keywords = {"sleep": lambda _: None, "local_host": host, "taskid": "77", **keywords}
    return download(output or result(server), folder, **keywords)


def test_a_file_comes_whole_without_any_header_of_ours(server, tmp_path):
    seen = []
    path = fetch(server, tmp_path / "new", on_bytes=lambda *n: seen.append(n))
    assert path.read_bytes() == MP4
    assert path.name == "0.mp4"
    assert seen[-1] == (1000, 1000)
    (headers,) = server.fetched
    assert not [name for name in headers if name.startswith("x-") or name == "authorization"]
    assert [p.name for p in path.parent.iterdir()] == ["0.mp4"]


@pytest.mark.parametrize("fault", [404, 403, 500, 503, "cut", "reset"])
def test_what_may_pass_is_tried_again(server, tmp_path, fault):
    server.fail("GET 0.mp4", fault, fault)
    assert fetch(server, tmp_path).read_bytes() == MP4
    assert len(server.fetched) == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (404, "HTTP 404"),
        (410, "HTTP 410"),
        ("cut", "connection failed|500 of 1000"),
        ("reset", "connection failed"),
        ("huge", "announced with 1099511627776 bytes"),
        (("redirect", "file:///etc/passwd"), "only https"),
        (("redirect", "http://169.254.169.254/latest"), "only https"),
        (("redirect", "https://169.254.169.254/latest"), "not a public address"),
        (("redirect", "https://127.0.0.1:1/x"), "not a public address"),
        (("redirect", "https://[::1]/x"), "not a public address"),
        (("redirect", "https://10.0.0.1/x"), "not a public address"),
        (("redirect", "/files/0.mp4"), "redirects"),
    ],
)
def test_what_does_not_pass_leaves_nothing_and_says_that_it_is_paid(server, tmp_path, fault, words):
    server.fail("GET 0.mp4", *[fault] * 20)
    with pytest.raises(DownloadError, match=words) as caught:
        fetch(server, tmp_path)
    assert "task 77" in str(caught.value)
    assert "collect it again" in str(caught.value)
    assert caught.value.taskid == "77"
    assert list(tmp_path.iterdir()) == []


def test_something_else_than_a_video_is_refused(server, tmp_path):
    server.files["0.mp4"] = b"<html>" + b"x" * 994
    with pytest.raises(DownloadError, match="not an MP4"):
        fetch(server, tmp_path)
    server.files["0.mp4"] = b""
    with pytest.raises(DownloadError, match="not an MP4|empty"):
        fetch(server, tmp_path, result(server, num_bytes=None))
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_limit_is_refused_while_it_comes(server, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 600)
    with pytest.raises(DownloadError, match="over 600"):
        fetch(server, tmp_path, result(server, num_bytes=None))
    assert list(tmp_path.iterdir()) == []


def test_a_stop_in_the_middle_leaves_nothing(server, tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path, check=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_explained(server, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DownloadError, match="No space left.*it is paid for"):
        fetch(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_explained(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="choose another folder"):
        fetch(server, tmp_path / "file")


def test_names_that_are_taken_get_a_number(server, tmp_path):
    names = [fetch(server, tmp_path).name for _ in range(3)]
    assert names == ["0.mp4", "0 (1).mp4", "0 (2).mp4"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0.mp4", "0.mp4"), ("../../etc/passwd", "passwd.mp4"), ("..\\..\\evil.mp4", "evil.mp4"),
        ("/abs/x.mp4", "x.mp4"), ("", "result.mp4"), ("..", "result.mp4"),
        ("con.mp4", "result.mp4"),
        ("a\0b\n.mp4", "a_b_.mp4"), ("a:b|c?.mp4", "a_b_c_.mp4"), ("x" * 300 + ".mp4", None),
        ("ünï.mp4", "ünï.mp4"),
    ],
)  # fmt: skip
def test_names_stay_in_their_folder(name, expected):
    got = safe_name(Output(name, "video/mp4", "", None, ""))
    assert expected is None or got == expected
    assert len(got) <= 130
    assert not set(got) & set('/\\:|?*"<>\0')


@pytest.mark.parametrize("url", ["http://cdn1.wiro.ai/x", "ftp://x/y", "https://a:b@x.org/", ""])
def test_only_https_is_fetched(server, tmp_path, url):
    with pytest.raises(DownloadError, match="only https"):
        fetch(server, tmp_path, replace(result(server), url=url), local_host="")


def test_this_machine_is_fetched_from_only_if_named(server, tmp_path):
    with pytest.raises(DownloadError, match="only https"):
        fetch(server, tmp_path, local_host="")
    with pytest.raises(DownloadError, match="only https"):
        fetch(server, tmp_path, local_host="127.0.0.1:1")


def test_a_netrc_sends_nothing(server, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login planted password planted\n")
    monkeypatch.setenv("NETRC", str(netrc))
    fetch(server, tmp_path / "out")
    assert "authorization" not in server.fetched[0]


def test_an_output_of_a_record_is_fetched(server, tmp_path):
    record = {"outputs": [{"name": "0.mp4", "url": server.file_url("0.mp4"), "size": "1000"}]}
    (output,) = parse_task(record).outputs
    assert fetch(server, tmp_path, output).read_bytes() == MP4


@pytest.mark.parametrize(
    ("started", "parameters", "label"),
    [
        (1750513340, {"prompt": "FPS-24, A fox runs: fast!"}, "2025-06-21_A-fox-runs-fast_"),
        (1750513340, {"prompt": "a fox", "seed": "42"}, "2025-06-21_a-fox_seed42_"),
        (1750513340, {"prompt": "one two three four five six seven"},
         "2025-06-21_one-two-three-four-five-six_"),
        (1750513340, {"prompt": "ein Füchslein läuft"}, "2025-06-21_ein-Füchslein-läuft_"),
        (1750513340, {"prompt": "../..\\con:*?<>|\x00\u202e"}, "2025-06-21_con_"),
        (1750513340, {"prompt": "ä" * 100}, f"2025-06-21_{'ä' * 24}_"),
        (1750513340, {"seed": "../x"}, "2025-06-21_task_"),
        (None, {"prompt": "a fox"}, ""),
        (10**18, {"prompt": "a fox"}, ""),
    ],
)  # fmt: skip
def test_a_label_tells_day_words_and_seed_and_is_safe_on_every_system(started, parameters, label):
    assert label_of(started, parameters) == label


def test_a_file_is_known_by_its_name_with_and_without_a_label():
    output = Output("0.mp4", "video/mp4", "", None, "")
    label = label_of(1750513340, {"prompt": "a fox", "seed": 1})
    for name in ("0.mp4", "0 (1).mp4", f"{label}0.mp4", f"{label}0 (2).mp4"):
        assert is_name_of(name, output)
    for name in ("1.mp4", "a_0.mp4", f"{label}1.mp4", f"x{label}0.mp4", f"{label}0.mp4.part"):
        assert not is_name_of(name, output)
