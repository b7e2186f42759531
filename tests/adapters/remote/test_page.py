"""The page's routes: who may change what, whose tasks are listed, what a workflow may not set."""

import asyncio
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from comfyui_skyreels.nodes import host
from comfyui_skyreels.nodes.remote import account, guard, routes, settings, tasks
from comfyui_skyreels.nodes.remote import nodes as remote
from comfyui_skyreels.nodes.remote import run as wiro_run
from comfyui_skyreels.wiro_api.errors import ConfigError, LimitError, WiroError
from comfyui_skyreels.wiro_api.spending import Limits
from support.wiro_server import KEY, SECRET

WRITING = (
    "account",
    "account/test",
    "limits",
    "tasks/1/stop",
    "tasks/1/delete_files",
    "tasks/1/refresh",
    "tasks/1/collect",
    "tasks/1/forget",
    "models/price",
    "settings",
    "price",
)
#: how a browser at this address asks
OWN = {"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:8188"}
NO_LIMITS = {"per_run": None, "per_day": None, "per_month": None}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No tries that are counted, no names that are listed, nothing frozen."""
    guard._wrong_at.clear()
    monkeypatch.delenv(guard.HOSTS_VARIABLE, raising=False)
    monkeypatch.delenv(guard.LOCK_VARIABLE, raising=False)


# --- where a request comes from -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("host_header", "origin"),
    [
        ("127.0.0.1:8188", "http://127.0.0.1:8188"),
        ("localhost:8188", "http://localhost:8188"),
        ("LocalHost:8188", "http://localhost:8188"),
        ("comfy.localhost:1", "http://comfy.localhost:1"),
        ("[::1]:8188", "http://[::1]:8188"),
        ("192.168.1.7:8188", "http://192.168.1.7:8188"),
        ("203.0.113.9", "https://203.0.113.9"),  # a proxy took the TLS off
        ("203.0.113.9:443", "https://203.0.113.9"),
        ("203.0.113.9", "http://203.0.113.9:80"),
    ],
)
@pytest.mark.parametrize("site", [{}, {"Sec-Fetch-Site": "same-origin"}])
def test_the_page_itself_is_let_in(host_header, origin, site):
    guard.check_sender({"host": host_header, "ORIGIN": origin, **site}.items())


FOREIGN = [
    {"Host": "127.0.0.1:8188"},  # no Origin
    {"Origin": "http://127.0.0.1:8188"},  # no Host
    {},
    {**OWN, "Origin": "null"},
    {**OWN, "Origin": ""},
    {**OWN, "Host": ""},
    {**OWN, "Origin": "file://"},
    {**OWN, "Origin": "127.0.0.1:8188"},
    {**OWN, "Origin": "ftp://127.0.0.1:8188"},
    {**OWN, "Origin": "chrome-extension://127.0.0.1:8188"},
    {**OWN, "Origin": "http://evil.example"},
    {**OWN, "Origin": "http://evil.example:8188"},
    {**OWN, "Origin": "http://127.0.0.1"},  # another port of this machine is another page
    {**OWN, "Origin": "http://127.0.0.1:9999"},
    {**OWN, "Origin": "http://localhost:8188"},
    {**OWN, "Origin": "http://127.0.0.1:8188@evil.example"},
    {**OWN, "Origin": "http://127.0.0.1:8188.evil.example"},
    {**OWN, "Origin": "http://127.0.0.1:x"},
    {**OWN, "Origin": "http://[127.0.0.1:8188"},
    {**OWN, "Origin": "http://127.0.0.1:8188, http://evil.example"},
    {**OWN, "Sec-Fetch-Site": "cross-site"},
    {**OWN, "Sec-Fetch-Site": "same-site"},
    {**OWN, "Sec-Fetch-Site": "none"},
    {**OWN, "Sec-Fetch-Site": "Same-Origin, cross-site"},
    # a name of the attacker's that points here
    {"Host": "evil.example:8188", "Origin": "http://evil.example:8188"},
    {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
    {"Host": "127.0.0.1.evil.example", "Origin": "http://127.0.0.1.evil.example"},
    {"Host": "localhost.evil.example", "Origin": "http://localhost.evil.example"},
    {"Host": "evil-localhost", "Origin": "http://evil-localhost"},
    {"Host": "127.1", "Origin": "http://127.1"},
    # what a page may add, and a proxy too
    {"Host": "evil.example", "Origin": "http://evil.example", "X-Forwarded-Host": "127.0.0.1:8188"},
    {**OWN, "Origin": "http://evil.example", "X-Forwarded-Host": "evil.example"},
    {**OWN, "Origin": "http://evil.example", "Forwarded": "host=evil.example"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_any_other_page_is_not(headers):
    with pytest.raises(guard.ForbiddenError, match="nothing was changed"):
        guard.check_sender(headers.items())


@pytest.mark.parametrize("doubled", ["Host", "Origin"])
def test_a_header_that_comes_twice_is_no_header(doubled):
    with pytest.raises(guard.ForbiddenError):
        guard.check_sender([*OWN.items(), (doubled.lower(), OWN[doubled])])


@pytest.mark.parametrize(
    ("listed", "headers", "is_let_in"),
    [
        ("comfy.example", ("comfy.example", "https://comfy.example"), True),
        (" Comfy.Example , other", ("comfy.example:8443", "https://comfy.example:8443"), True),
        ("https://comfy.example/", ("comfy.example", "https://comfy.example"), True),
        # a proxy that hands its own address, or no port, on as Host
        ("comfy.example", ("127.0.0.1:8188", "https://comfy.example"), True),
        ("comfy.example:8443", ("comfy.example", "https://comfy.example:8443"), True),
        ("comfy.example:8443", ("127.0.0.1:8188", "https://comfy.example"), False),
        ("comfy.example", ("127.0.0.1:8188", "https://evil.example"), False),
        ("comfy.example", ("evil.example", "https://comfy.example"), False),
        ("comfy.example", ("", "https://comfy.example"), False),
        (",", ("", "https://evil.example"), False),
        ("", ("comfy.example", "https://comfy.example"), False),
        ("example", ("comfy.example", "https://comfy.example"), False),
    ],
)
def test_a_name_of_a_proxy_is_listed_by_the_user(monkeypatch, listed, headers, is_let_in):
    monkeypatch.setenv(guard.HOSTS_VARIABLE, listed)
    pairs = list(zip(("Host", "Origin"), headers, strict=True))
    if is_let_in:
        guard.check_sender(pairs)
    else:
        with pytest.raises(guard.ForbiddenError):
            guard.check_sender(pairs)


def test_a_refusal_names_the_variable_to_set():
    with pytest.raises(guard.ForbiddenError, match="SKYREELS_WIRO_HOSTS=comfy.example"):
        headers = {"Host": "comfy.example", "Origin": "https://comfy.example"}
        guard.check_sender(headers.items())


class Table:
    """The server's table of routes, as far as `register` uses it."""

    def __init__(self):
        self.get_routes, self.post_routes = {}, {}

    def get(self, path):
        return lambda function: self.get_routes.setdefault(path, function)

    def post(self, path):
        return lambda function: self.post_routes.setdefault(path, function)


class Request:
    """A request whose body may be read only where `body` is given."""

    content_type = "application/json"
    method = "POST"

    def __init__(self, path, headers, body=None):
        self.path, self.headers, self._body = path, headers, body
        row, _, action = path.rpartition("tasks/")[2].partition("/")
        self.match_info = {"row": row, "action": action}
        self.content = self
        self.query = {}

    async def iter_chunked(self, size):
        assert self._body is not None, "the body of a refused request was read"
        yield json.dumps(self._body).encode()


@pytest.fixture
def ask(monkeypatch):
    """Ask a route as the server would; the answer is (status, object)."""
    aiohttp = ModuleType("aiohttp")
    aiohttp.web = SimpleNamespace(json_response=lambda body, status=200: (status, body))
    monkeypatch.setitem(sys.modules, "aiohttp", aiohttp)
    table = Table()
    routes.register(table)

    def ask(path, headers, body=None, method="POST"):
        pattern = path
        if path.startswith("tasks/"):
            pattern = "tasks/{row:[0-9]{1,18}}/{action}"
        found = table.post_routes if method == "POST" else table.get_routes
        handler = found[f"{routes.PREFIX}/{pattern}"]
        return asyncio.run(handler(Request(path, headers, body)))

    ask.table = table
    return ask


@pytest.mark.parametrize("path", WRITING)
def test_every_route_that_writes_judges_the_sender_before_it_reads(comfy, ask, path):
    assert len(ask.table.post_routes) == 7, "a new one must be added here"
    for headers in FOREIGN:
        status, answer = ask(path, headers)
        assert (status, "nothing was changed" in answer["error"]) == (403, True)
    assert not (comfy.root / "user").exists()
    assert ask(path, OWN, [])[0] == 400


def test_looking_changes_nothing_and_makes_no_file(comfy, wiro, ask):
    before = sorted(comfy.root.rglob("*"))
    for path in ("account", "tasks"):
        status, answer = ask(path, {}, method="GET")
        assert status == 200, answer
    assert tasks.downloaded_file(1, "0.mp4") is None
    assert sorted(comfy.root.rglob("*")) == before
    assert wiro.seen == []


def test_looking_at_tasks_that_are_there_changes_none_of_them(comfy, wiro, ask):
    generate()
    files = {path: path.read_bytes() for path in comfy.root.rglob("*") if path.is_file()}
    asked = len(wiro.seen)
    for path in ("account", "tasks"):
        assert ask(path, {}, method="GET")[0] == 200
    assert tasks.downloaded_file(1, "0.mp4")
    assert {path: path.read_bytes() for path in comfy.root.rglob("*") if path.is_file()} == files
    assert len(wiro.seen) == asked


def test_what_forbids_is_told_with_status_403(comfy, wiro, ask):
    status, answer = ask("limits", OWN, NO_LIMITS)
    assert status == 403
    assert "Type the last 4 characters of the key in use" in answer["error"]
    assert ask("limits", OWN, {**NO_LIMITS, "proof": KEY[-4:]})[0] == 200


# --- proof --------------------------------------------------------------------------------------


@pytest.fixture
def stored(comfy, wiro, monkeypatch):
    """A key that was typed into the page."""
    monkeypatch.delenv("WIRO_API_KEY")
    monkeypatch.delenv("WIRO_API_SECRET")
    settings.save_account({"api_key": KEY, "api_secret": SECRET})  # the first needs no proof
    return account.credentials_file()


@pytest.mark.parametrize(
    "proof", ["", "  ", "x", "-KEY", KEY[:4], KEY, KEY[-3:], "\ud800", "ä" * 4]
)
@pytest.mark.parametrize("new", ["another-key", ""])
def test_a_key_is_replaced_or_removed_only_by_who_knows_it(stored, proof, new):
    before = stored.read_bytes()
    with pytest.raises(guard.ForbiddenError, match="last 4 characters of the key"):
        settings.save_account({"api_key": new, "api_secret": "", "proof": proof})
    assert stored.read_bytes() == before
    settings.save_account({"api_key": new, "api_secret": "", "proof": f" {KEY[-4:]} "})
    assert stored.exists() is bool(new)


def test_a_key_that_is_none_is_told_before_the_proof_is_tried(stored):
    with pytest.raises(ConfigError, match="holds a blank"):
        settings.save_account({"api_key": "a b", "api_secret": "", "proof": "nope"})
    assert guard._wrong_at == []


@pytest.mark.parametrize("source", ["file", "environment"])
@pytest.mark.parametrize(
    "more", [NO_LIMITS, {**NO_LIMITS, "per_run": "2.01"}, {**NO_LIMITS, "per_run": "1e9"}]
)
def test_more_may_be_spent_only_after_a_proof_and_less_without(stored, monkeypatch, source, more):
    end = KEY[-4:]
    if source == "environment":
        monkeypatch.setenv("WIRO_API_KEY", "key-of-environment")
        end = "ment"
    less = {"per_run": "1.50", "per_day": "3", "per_month": None}
    assert settings.save_limits(less)["limits"] == {
        "per_run": "1.5",
        "per_day": "3",
        "per_month": None,
    }
    with pytest.raises(guard.ForbiddenError):
        settings.save_limits(more)
    assert settings.save_limits({**less, "per_day": "2"})["limits"]["per_day"] == "2"
    answer = settings.save_limits({**more, "proof": end})
    assert answer["limits"]["per_day"] is None
    assert answer["has_default_limits"] is False


def test_limits_that_cannot_be_read_are_set_again_only_after_a_proof(stored):
    account.limits_file().write_text("{broken")
    with pytest.raises(guard.ForbiddenError):
        settings.save_limits({**NO_LIMITS, "per_run": "0"})
    settings.save_limits({**NO_LIMITS, "per_run": "0", "proof": KEY[-4:]})


def test_without_a_key_there_is_nothing_to_prove(comfy, wiro, monkeypatch):
    monkeypatch.delenv("WIRO_API_KEY")
    assert settings.save_limits(NO_LIMITS)["limits"] == NO_LIMITS


def test_wrong_tries_are_counted_and_then_none_is_looked_at(stored, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    remove = {"api_key": "", "proof": "nope"}
    for _ in range(guard.MAX_WRONG):
        with pytest.raises(guard.ForbiddenError, match="not the last characters of the key"):
            settings.save_account(remove)
        now[0] += 1
    for proof in ("nope", KEY[-4:]):
        with pytest.raises(guard.ForbiddenError, match="locked for 10 minutes"):
            settings.save_account({**remove, "proof": proof})
    now[0] += guard.WRONG_S
    settings.save_account({**remove, "proof": KEY[-4:]})
    assert not stored.exists()


def test_a_good_try_lets_the_wrong_ones_be_forgotten(stored):
    for _ in range(3):
        for _ in range(guard.MAX_WRONG - 1):
            with pytest.raises(guard.ForbiddenError):
                settings.save_limits({**NO_LIMITS, "proof": "nope"})
        settings.save_limits({**NO_LIMITS, "proof": KEY[-4:]})
        settings.save_limits({**NO_LIMITS, "per_run": "1"})


@pytest.mark.parametrize("value", ["1", "true", "yes", "anything"])
def test_a_switch_of_the_environment_freezes_key_and_limits(stored, monkeypatch, value):
    monkeypatch.setenv(guard.LOCK_VARIABLE, value)
    proof = {"proof": KEY[-4:]}
    for change in (
        lambda: settings.save_account({"api_key": "another-key", "api_secret": "", **proof}),
        lambda: settings.save_account({"api_key": "", **proof}),
        lambda: settings.save_limits({**NO_LIMITS, **proof}),
        lambda: settings.save_limits({**NO_LIMITS, "per_run": "0.01"}),
    ):
        with pytest.raises(guard.ForbiddenError, match="locked.*SKYREELS_WIRO_LOCKED"):
            change()
    assert settings.describe_account()["is_locked"] is True
    assert KEY in stored.read_text()
    assert not account.limits_file().exists()


@pytest.mark.parametrize("value", ["", " ", "0", "no", "Off", "false"])
def test_the_switch_can_be_off(monkeypatch, value):
    monkeypatch.setenv(guard.LOCK_VARIABLE, value)
    assert not guard.is_locked()


# --- several users ------------------------------------------------------------------------------


def picture() -> torch.Tensor:
    return torch.linspace(0, 1, 48 * 64 * 3).reshape(1, 48, 64, 3)


def generate(prompt="a woman smiles", **changes):
    inputs = {
        "image": picture(),
        "prompt": prompt,
        "size": "by orientation",
        "fit": "crop",
        "num_frames": 97,
        "steps": 30,
        "cfg": 6.0,
        **changes,
    }
    with torch.inference_mode():
        return asyncio.run(remote.WiroRemoteI2V().generate(**inputs, unique_id="7"))


@pytest.mark.parametrize("is_multi_user", [True, False])
def test_events_and_lines_go_to_the_page_that_queued(comfy, wiro, is_multi_user):
    comfy.is_multi_user, comfy.client = is_multi_user, "page of anna"
    generate()
    assert comfy.events
    assert set(comfy.sent_to) == {"page of anna"}


def test_a_run_that_no_page_queued_is_told_to_nobody_among_several_users(comfy, wiro):
    comfy.is_multi_user, comfy.client = True, None
    generate()
    assert (comfy.events, comfy.texts) == ([], [])
    comfy.is_multi_user = False
    generate(take=2)
    assert set(comfy.sent_to) == {None}, "to every page of the one user"


@pytest.fixture
def two_users(comfy, wiro):
    """Anna and Bert have run a model each; their rows, by name."""
    comfy.is_multi_user = True
    for comfy.user in ("anna", "bert"):
        comfy.client = f"page of {comfy.user}"
        generate(prompt=f"of {comfy.user}")
    comfy.user, comfy.client = "", "page of somebody"
    generate(prompt="queued without a name")
    return {user: tasks.list_tasks(50, user)["tasks"][0]["id"] for user in ("anna", "bert")}


def test_tasks_are_listed_for_who_queued_them(two_users):
    assert two_users == {"anna": 1, "bert": 2}
    assert len(tasks.list_tasks(50, "anna")["tasks"]) == 1
    assert tasks.list_tasks(50, "carl")["tasks"] == []
    assert len(tasks.list_tasks(50)["tasks"]) == 3, "a server with one user shows all"


@pytest.mark.parametrize("action", sorted(tasks.ACTIONS))
def test_a_task_of_another_user_is_as_if_it_were_not_there(comfy, wiro, two_users, action):
    seen, events = len(wiro.seen), len(comfy.events)
    for row in (two_users["bert"], 3, 99):
        with pytest.raises(WiroError, match=f"has no task {row}"):
            tasks.act(row, action, "anna")
    assert (len(wiro.seen), len(comfy.events)) == (seen, events)


def test_an_action_tells_nobody_but_who_queued_the_task(comfy, wiro, two_users):
    comfy.sent_to.clear()
    tasks.act(two_users["bert"], "delete_files", "bert")
    assert comfy.sent_to == ["page of bert"]


def test_a_page_of_several_users_must_say_whose_it_is(comfy, wiro, two_users, ask):
    own = {**OWN, "comfy-user": "bert"}
    assert [t["id"] for t in ask("tasks", own, method="GET")[1]["tasks"]] == [two_users["bert"]]
    assert ask("tasks/1/delete_files", own, {})[0] == 502
    assert ask("tasks/2/delete_files", own, {})[1]["task"]["remote_deleted"]
    for headers in (OWN, {**OWN, "comfy-user": "carl"}):
        for answer in (ask("tasks", headers, method="GET"), ask("tasks/2/stop", headers, {})):
            assert (answer[0], "several users" in answer[1]["error"]) == (403, True)


def test_the_page_is_told_that_the_account_is_everybodys(comfy, wiro):
    assert settings.describe_account()["is_shared"] is False
    comfy.is_multi_user = True
    assert settings.describe_account()["is_shared"] is True


def test_who_queued_a_prompt_is_kept_with_it(comfy, monkeypatch):
    """Through the server's own hooks, and never as the request itself claims."""
    aiohttp = ModuleType("aiohttp")
    aiohttp.web = SimpleNamespace(middleware=lambda function: function)
    monkeypatch.setitem(sys.modules, "aiohttp", aiohttp)
    server, handlers = sys.modules["server"].PromptServer.instance, []
    server.app = SimpleNamespace(middlewares=[])
    server.add_on_prompt_handler = handlers.append
    host.record_prompt_users()
    assert (server.app.middlewares, handlers) == ([], []), "nothing is hooked for one user"
    comfy.is_multi_user = True
    host.record_prompt_users()
    (middleware,), (mark,) = server.app.middlewares, handlers

    async def queue(headers, prompt):
        async def handler(_):
            return mark(prompt)

        return await middleware(SimpleNamespace(headers=headers), handler)

    async def all_of_them():
        claimed = {"extra_data": {"skyreels_user": "anna"}}
        return await asyncio.gather(
            queue({"comfy-user": "anna"}, {}),
            queue({"comfy-user": "bert"}, claimed),
            queue({}, {"extra_data": {"skyreels_user": "anna"}}),
            queue({"comfy-user": "x"}, {}),
        )

    marked = asyncio.run(all_of_them())
    users = [prompt["extra_data"]["skyreels_user"] for prompt in marked]
    assert users == ["anna", "bert", "", ""]


# --- files of a task ----------------------------------------------------------------------------


def test_only_a_tasks_own_files_are_handed_out(comfy, wiro):
    generate()
    assert tasks.downloaded_file(1, "0.mp4") == comfy.root / "output" / "wiro" / "2221" / "0.mp4"
    account.credentials_file().parent.mkdir(parents=True, exist_ok=True)
    account.credentials_file().write_text("secret")
    for name in ("", "1.mp4", "../2221/0.mp4", "../../../user/__skyreels/wiro.env", "/etc/passwd"):
        assert tasks.downloaded_file(1, name) is None
    assert tasks.downloaded_file(2, "0.mp4") is None


# --- what a workflow may not say ----------------------------------------------------------------

ELSEWHERE = [
    "callbackUrl",
    "callbackurl",
    "CALLBACKURL",
    "callback_url",
    "callback-url",
    "callbackUrl ",
    " callbackUrl",
    "callbackUrl[]",
    "call\u200bbackUrl",
    "callback",
    "\uff43allbackUrl",
    "webhook",
    "webHookUrl",
    "webhook_url",
    "Web-Hook",
    "projectid",
    "projectId",
    "project_id",
    "PROJECT-ID",
    "projectid\n",
]


def run_any(values, **changes):
    inputs = {"model": "wiro/SkyReels-V1", "image": picture(), **changes}
    with torch.inference_mode():
        text = values if isinstance(values, str) else json.dumps(values)
        node = remote.WiroRunModel()
        return asyncio.run(node.run(parameters=text, **inputs, unique_id="7"))


def test_a_workflow_sends_no_result_and_no_bill_elsewhere(comfy, wiro):
    for name in ELSEWHERE:
        evil = {name: "https://evil.example"}
        for more in (evil, {"x": evil}, {"x": [[evil], {"y": evil}]}):
            values = {"prompt": "x", "size": "960x544", **more}
            with pytest.raises(ConfigError, match="a workflow may not do that. Nothing was sent"):
                run_any(values)
            assert "a workflow may not" in remote.WiroRunModel.VALIDATE_INPUTS(json.dumps(values))
    assert wiro.seen == [], "not even the price was asked for"


def test_nor_in_the_name_of_a_file(comfy, wiro):
    for name in ELSEWHERE:
        with pytest.raises(ConfigError, match="a workflow may not do that"):
            run_any({"prompt": "x", "size": "960x544"}, image_parameter=name)
        assert "a workflow may not" in remote.WiroRunModel.VALIDATE_INPUTS("{}", name)
    assert wiro.seen == []


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "callbackUrl and projectid"},
        {"prompt": '{"callbackUrl": "x"}'},
        {"project": "x", "back": "y", "call": "z", "hook": 1},
    ],
)
def test_texts_that_only_speak_of_it_are_texts(values):
    wiro_run.check_fields(values)
    assert remote.WiroRunModel.VALIDATE_INPUTS(json.dumps(values)) is True


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"a":' * 900 + "1" + "}" * 900]
)
def test_parameters_that_are_too_deep_are_a_sentence(text):
    verdict = remote.WiroRunModel.VALIDATE_INPUTS(text)
    assert verdict is True or "not valid JSON" in verdict


def test_on_the_command_line_where_a_person_types_it_a_callback_is_sent(comfy, wiro, tmp_path):
    from comfyui_skyreels.wiro_api.cli import main

    wiro.states = ("task_postprocess_end",)
    given = {
        "prompt": "x",
        "inputImageUrl": "https://x.example/a.png",
        "size": "960x544",
        "callbackUrl": "https://mine.example",
        "projectid": "7",
    }
    parameters = [f"--param={name}={value}" for name, value in given.items()]
    places = ["--out", str(tmp_path), "--journal", str(tmp_path / "journal.sqlite")]
    assert main(["run", "wiro/SkyReels-V1", *parameters, *places]) == 0
    sent = next(seen.body for seen in wiro.seen if seen.path.startswith("Run/"))
    assert (sent["callbackUrl"], sent["projectid"]) == ("https://mine.example", "7")


def test_a_model_of_a_workflow_whose_price_is_not_told_waits_for_the_users_limits(comfy, wiro):
    wiro.slugs = ("acme/other",)
    values = {"prompt": "x", "size": "960x544"}
    with pytest.raises(LimitError, match="acme/other.*you have set no limits yet"):
        run_any(values, model="acme/other")
    assert wiro.tasks == {}
    settings.save_limits({**NO_LIMITS, "proof": KEY[-4:]})
    assert run_any(values, model="acme/other")[3] == "2221"


def test_the_default_limit_holds_a_workflow_that_costs_more(comfy, wiro):
    wiro.price = [{"inputs": {}, "price": 2.01, "priceMethod": "cpr"}]
    with pytest.raises(LimitError, match=r"would cost \$2.01; your limit is \$2.00 a run"):
        generate()
    assert wiro.tasks == {}
    assert any(
        "limit $2.00 a run, $20.00 a day (default; change it in" in text for text in comfy.texts
    )


def test_skyreels_without_a_price_runs_under_the_default_and_says_so(comfy, wiro):
    generate()
    assert any("the default limit of $2.00 a run cannot hold it" in text for text in comfy.texts)
    assert len(wiro.tasks) == 1


def test_the_users_own_none_is_honoured(comfy, wiro):
    wiro.price = [{"inputs": {}, "price": 50, "priceMethod": "cpr"}]
    settings.save_limits({**NO_LIMITS, "proof": KEY[-4:]})
    generate()
    assert "sending · price $50.00, no limit" in comfy.texts
    assert Limits().is_default is False


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "sub/a.png", "a.png [output]"])
def test_a_link_brings_no_file_from_outside_the_input_folder(comfy, wiro, name):
    (comfy.root / "secret.txt").write_text("secret")
    (comfy.root / "input" / "sub").mkdir()
    (comfy.root / "input" / "sub" / "a.png").write_bytes(b"x")
    node = remote.WiroUploadFile()
    with pytest.raises(ConfigError, match="no file"):
        asyncio.run(node.upload(name, "", unique_id="7"))
    assert wiro.seen == []


def test_the_checking_script_parses_the_pages_scripts_and_says_so_if_it_cannot(
    tmp_path, monkeypatch, capfd, root
):
    import importlib.util
    import shutil

    spec = importlib.util.spec_from_file_location("check", root / "tests" / "scripts" / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    if shutil.which("node"):
        (tmp_path / "web").mkdir()
        (tmp_path / "tests" / "web").mkdir(parents=True)
        monkeypatch.setattr(check, "ROOT", tmp_path)
        (tmp_path / "web" / "bad.js").write_text('import { a } from "./a.js";\nconst b = {;\n')
        assert check.check_page() != 0
        assert "web/bad.js does not parse" in capfd.readouterr().out.replace("\\", "/")
        (tmp_path / "web" / "bad.js").write_text("export const b = 1;\n")
        test = tmp_path / "tests" / "web" / "b.test.mjs"
        test.write_text('import "node:test";\nthrow new Error("no");\n')
        assert check.check_page() != 0
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    assert check.check_page() == 0
    assert "not checked: Node.js is not installed" in capfd.readouterr().out


# --- older rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["", "anna"])
def test_rows_beyond_the_first_page_are_reached(comfy, wiro, user):
    journal = account.journal()
    ids = [journal.adopt(str(number), "wiro/SkyReels-V1").id for number in range(1, 8)]
    for number in ids:
        journal.note_user(number, "anna")
    found, before = [], None
    while True:
        answer = tasks.list_tasks(3, user, before)
        found += [task["id"] for task in answer["tasks"]]
        before = found[-1]
        if not answer["has_more"]:
            break
    assert found == ids[::-1]
    assert tasks.list_tasks(7, user)["has_more"] is False
    assert tasks.list_tasks(3, user, ids[0]) == {"tasks": [], "has_more": False, "error": ""}


@pytest.mark.parametrize("text", ["", "x", "-1", "1e3", "٣", "9" * 30, "1.5", " 1"])
def test_a_number_of_the_query_that_is_none_is_none(text):
    assert routes._number(text) is None
