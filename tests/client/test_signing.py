"""Signature, nonces, credentials. The vectors were computed with OpenSSL and with Python's hmac."""

import stat
import threading

import pytest
from comfyui_skyreels.wiro_api.errors import ConfigError
from comfyui_skyreels.wiro_api.signing import (
    OWN_DIGITS,
    Credentials,
    Nonces,
    load_credentials,
    save_credentials,
    sign,
)


@pytest.mark.parametrize(
    ("nonce", "signature"),
    [
        ("1734513807", "e843f5e4ef86b64976d1e75eb4164d4f145813524596c9daa0c83c70668a9f98"),
        ("1734513807000", "020bdfa290b99f5141a56b5b37c78219adc7a6d7d88088c13972d6c9b7580cb4"),
    ],
)
def test_known_signatures(nonce, signature):
    assert sign("test-key", "test-secret", nonce) == signature


def test_swapped_roles_or_a_newline_give_something_else():
    swapped = "d5ef6ea82ffdfdb30c2fa4da0b590f9c0fbbf8bf8403e1e5792308a3d4f60e83"
    newline = "bf1dadbc3189c8e8e94889877b53942b5b052f031871a6c49883d070c2626ed6"
    assert sign("test-secret", "test-key", "1734513807") == swapped
    assert sign("test-key", "test-secret", "1734513807\n") == newline
    assert sign("test-key", "test-secret", "1734513807") not in (swapped, newline)


def test_nonces_rise_strictly_in_all_threads_and_when_the_clock_is_set_back():
    times = iter([100.0, 100.0, 50.0, 100.001, *[100.0] * 2000])
    nonces = Nonces(lambda: next(times))
    four = [nonces.next() for _ in range(4)]
    assert [nonce[:-OWN_DIGITS] for nonce in four] == ["100000", "100001", "100002", "100003"]
    assert len({nonce[-OWN_DIGITS:] for nonce in four}) == 1
    drawn: list[int] = []

    def draw() -> None:
        drawn.extend(int(nonces.next()) for _ in range(100))

    threads = [threading.Thread(target=draw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(drawn)) == 800


@pytest.mark.parametrize("value", ["test-key", '"test-key"', " 'test-key' \n", "\ttest-key"])
def test_blanks_and_quotes_around_a_key_are_taken_off(value):
    found = load_credentials({"WIRO_API_KEY": value, "WIRO_API_SECRET": f'"{value}"'})
    assert (found.api_key, found.api_secret.strip("\"' \n\t")) == ("test-key", "test-key")


@pytest.mark.parametrize("value", ["", "  ", '""'])
def test_no_key_is_explained(value):
    with pytest.raises(ConfigError, match="no Wiro API key: set WIRO_API_KEY"):
        load_credentials({"WIRO_API_KEY": value})


@pytest.mark.parametrize("value", ["two words", "umläut", "line\nbreak"])
def test_a_key_that_cannot_be_one_is_refused_without_being_shown(value):
    with pytest.raises(ConfigError, match="copy it again") as caught:
        load_credentials({"WIRO_API_KEY": value})
    assert value not in str(caught.value)


def test_the_environment_comes_before_the_file_which_only_its_owner_can_read(tmp_path):
    file = tmp_path / "new" / "wiro.env"
    save_credentials(file, Credentials("file-key", "file-secret"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    save_credentials(file, Credentials("file-key", "file-secret"))
    assert load_credentials({}, file) == Credentials("file-key", "file-secret")
    assert load_credentials({"WIRO_API_KEY": "k"}, file) == Credentials("k", "")
    assert [path.name for path in file.parent.iterdir()] == ["wiro.env"]


def test_credentials_are_never_shown():
    credentials = Credentials("planted-key-1234", "planted-secret")
    assert "planted" not in repr(credentials) + str(credentials)
