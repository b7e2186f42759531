"""What an answer to a Run says about whether a task was made: every status with every body.

Whoever gives it: only the service's own plain no, and statuses that come before anything is done,
let the same job be sent again.
"""

import pytest
from comfyui_skyreels.wiro_api.client import Client
from comfyui_skyreels.wiro_api.errors import (
    ApiError,
    RunOutcomeUnknownError,
    TransportError,
    WiroError,
)
from comfyui_skyreels.wiro_api.jobs import Job, start
from comfyui_skyreels.wiro_api.journal import Journal
from comfyui_skyreels.wiro_api.signing import Credentials
from support.wiro_client import MODEL, PARAMETERS, Clock
from support.wiro_replies import Replies

pytestmark = pytest.mark.usefixtures("calls_at_once")
STATUSES = (
    200, 201, 202, 204, 206, 300, 301, 302, 303, 304, 307, 308, 400, 401, 402, 403, 404, 405, 406,
    407, 408, 409, 410, 411, 412, 413, 414, 415, 416, 417, 418, 421, 422, 423, 424, 425, 426, 428,
    429, 431, 444, 451, 460, 494, 495, 499, 500, 501, 502, 503, 504, 505, 507, 508, 520, 522, 524,
    530, 599,
)  # fmt: skip
#: no task was made, whatever the body says
NOTHING_MADE = {*range(300, 400), 401, 403, 404, 405, 413, 429}
#: name -> (body, whether it is the service's own plain no)
BODIES: dict[str, tuple[bytes, bool]] = {
    "own, balance": (b'{"result": false, "errors": [{"code": 97, "message": "low"}]}', True),
    "own, busy": (b'{"result": false, "errors": [{"code": 96, "message": "full"}]}', True),
    "own, text codes": (b'{"result": "false", "errors": [{"code": "98", "message": "x"}]}', True),
    "own, parameter": (
        b'{"result": false, "errors": [{"code": 0, "message": "Request parameter [x] required"}]}',
        True,
    ),
    "own, with a time": (
        b'{"result": 0, "errors": [{"code": 97, "message": "low", "time": 1}]}', True,
    ),
    "own, a sentence": (b'{"result": false, "errors": ["Request parameters are invalid."]}', True),
    "own, without result": (b'{"errors": [{"code": 97, "message": "low"}]}', True),
    "own, unclear": (b'{"result": false, "errors": [{"code": 0, "message": "hiccup"}]}', False),
    "own, no reason": (b'{"result": false, "errors": []}', False),
    "own, unknown code": (b'{"result": false, "errors": [{"code": 42, "message": "x"}]}', False),
    "a no that names a task": (
        b'{"result": false, "errors": [{"code": 97, "message": "low"}], "taskid": "2221"}', False,
    ),
    "result is null": (b'{"result": null, "errors": [{"code": 97, "message": "x"}]}', False),
    "a gateway's message": (b'{"message": "signature not allowed"}', False),
    "a gateway's error": (b'{"error": "permission denied", "status": 400}', False),
    "a gateway's errors": (
        b'{"success": false, "errors": [{"code": 7003, "message": "not allowed"}]}', False,
    ),
    "a gateway's sentence": (b'{"errors": "permission denied"}', False),
    "errors of another shape": (b'{"result": false, "errors": {"code": 97}}', False),
    "html": (b"<html><body>Bad gateway</body></html>", False),
    "empty": (b"", False),
    "half": (b'{"result": false, "errors": [{"code": 97, "mess', False),
    "a list": (b"[]", False),
    "null": (b"null", False),
    "a number": (b"97", False),
    "an empty object": (b"{}", False),
    "no text": (b"\xff\xfe\0\x9d", False),
}  # fmt: skip


def is_plain_no(status: int, name: str) -> bool:
    is_own = BODIES[name][1] and status != 204  # which has no body
    return status in NOTHING_MADE or (is_own and status < 500 and status != 408)


def client_of(replies: Replies) -> Client:
    clock = Clock()
    return Client(
        Credentials("test-key"), base_url=replies.url, session=replies.session, clock=clock,
        sleep=clock.sleep, now=clock.now,
    )  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_only_a_plain_no_is_a_refusal(name):
    wrong = []
    for status in STATUSES:
        replies = Replies({"Run": [(status, BODIES[name][0])]})
        with pytest.raises(WiroError) as caught:
            client_of(replies).run(MODEL, PARAMETERS)
        is_no = isinstance(caught.value, ApiError | TransportError)
        assert is_no or isinstance(caught.value, RunOutcomeUnknownError)
        if is_no is not is_plain_no(status, name) or replies.count("Run") != 1:
            wrong.append((status, type(caught.value).__name__, replies.count("Run")))
    assert wrong == []


@pytest.mark.parametrize(
    ("status", "name"),
    [(200, "own, balance"), (400, "own, parameter"), (401, "html"), (429, "empty"), (200, "empty"),
     (408, "html"), (408, "own, balance"), (400, "html"), (400, "a gateway's message"),
     (402, "a gateway's error"), (409, "empty"), (418, "null"), (499, "empty"), (502, "html"),
     (503, "own, busy"), (200, "own, unclear"), (200, "a no that names a task")],
)  # fmt: skip
def test_the_same_command_again_sends_it_again_only_after_a_plain_no(tmp_path, status, name):
    replies = Replies({"Run": [(status, BODIES[name][0])]})
    journal = Journal(tmp_path / "journal.sqlite")
    for _ in range(2):
        with pytest.raises(WiroError):
            start(client_of(replies), journal, Job(MODEL, PARAMETERS))
    expected = ("refused", 2) if is_plain_no(status, name) else ("sending", 1)
    assert (journal.newest()[0].state, replies.count("Run")) == expected


@pytest.mark.parametrize("status", [200, 400, 408, 429, 500, 502, 503])
def test_an_answer_before_the_end_has_left_is_no_unknown_outcome(status, tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    for name in ("html", "empty", "own, unclear", "own, busy"):
        replies = Replies({"Run": [(status, BODIES[name][0])]}, reads_body=False)
        with pytest.raises((ApiError, TransportError)):
            start(client_of(replies), journal, Job(MODEL, {**PARAMETERS, "prompt": name}))
        assert journal.newest()[0].state == "refused"
        assert replies.count("Run") <= 3
