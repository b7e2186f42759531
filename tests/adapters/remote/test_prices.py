"""What a run will cost, told before it is queued."""

import asyncio
import contextlib
import itertools
import json

import pytest
import torch
from comfyui_skyreels.nodes.i2v import SkyReelsI2V
from comfyui_skyreels.nodes.remote import account, prices, widgets
from comfyui_skyreels.nodes.remote import nodes as remote
from comfyui_skyreels.skyreels.errors import OptionError
from comfyui_skyreels.wiro_api import jobs
from comfyui_skyreels.wiro_api.client import Model
from comfyui_skyreels.wiro_api.errors import ConfigError
from comfyui_skyreels.wiro_api.jobs import Job, quote
from support.wiro_server import KEY

WIDGETS = {
    "prompt": "a fox",
    "size": "960x544",
    "fit": "crop",
    "num_frames": 97,
    "steps": 30,
    "cfg": 6.0,
    "negative_prompt": "",
    "add_fps_prefix": True,
    "take": 1,
    "wait_when_busy": False,
    "timeout_minutes": 40.0,
}
#: of SkyReels I2V
EITHER = {
    **WIDGETS,
    "backend": "remote",
    "width": 960,
    "height": 544,
    "seed": 0,
    "transformer": "auto",
    "allow_paid_remote": False,
}
ANY = {
    "model": "wiro/SkyReels-V1",
    "parameters": '{"prompt": "x"}',
    "image_parameter": "inputImage",
}


def ask(node="WiroRemoteI2V", linked=("image",), values=None, **changes):
    default = {"WiroRunModel": ANY, "SkyReelsI2V": EITHER}.get(node, WIDGETS)
    shown = {**default, **changes}
    return prices.node_price({"node": node, "values": values or shown, "linked": list(linked)})


def listed(price="0.30", method="cpr", **inputs):
    return [{"inputs": inputs, "price": price, "priceMethod": method}]


def runs(wiro):
    return [seen for seen in wiro.seen if seen.path.startswith("Run/")]


def test_the_price_of_a_node_is_told_and_nothing_is_started_or_written(comfy, wiro):
    wiro.price = listed()
    before = sorted(comfy.root.rglob("*"))
    told = {"has_key": True, "price": "0.3", "is_exact": True, "is_each": False, "is_free": False,
            "is_most": False, "problem": ""}  # fmt: skip
    assert ask() == told
    assert ask("SkyReelsI2V") == told
    assert ask("WiroRunModel") == told
    assert ask("WiroSubmit") == {**told, "is_exact": False, "is_each": True}
    assert sorted(comfy.root.rglob("*")) == before
    assert {seen.path for seen in wiro.seen} == {"Tool/Detail"}
    assert len(wiro.seen) == 1, "what Wiro says of a model is kept for a while"


def test_it_is_the_price_that_the_run_is_sent_with(comfy, wiro):
    wiro.price = [*listed("0.10", "cp-outputVideoLength"), *listed("0.05", size="544x960")]
    for changes in ({}, {"size": "544x960"}, {"num_frames": 50}):
        told = ask(**changes)["price"]
        picture = torch.zeros(1, 48, 64, 3)
        with torch.inference_mode():
            node = remote.WiroRemoteI2V()
            asyncio.run(node.generate(image=picture, **{**WIDGETS, **changes}, unique_id="7"))
        assert account.journal().newest()[0].projected == told


def test_without_a_key_nothing_is_asked(comfy, wiro, monkeypatch):
    monkeypatch.delenv("WIRO_API_KEY")
    for node in ("WiroRemoteI2V", "WiroRunModel"):
        assert ask(node)["has_key"] is False
    assert wiro.seen == []


@pytest.mark.parametrize(
    ("linked", "is_exact"),
    [
        (["image"], True),
        ([], True),
        (["image", "prompt"], False),
        (["num_frames"], False),
        (["image", "size"], False),
    ],
)
def test_what_a_link_brings_is_not_known_and_the_price_is_about(comfy, wiro, linked, is_exact):
    wiro.price = listed()
    told = ask(linked=linked)
    assert (told["price"], told["is_exact"]) == ("0.3", is_exact)
    assert ask(size=widgets.ORIENTATION)["is_exact"] is False


@pytest.mark.parametrize(
    ("changes", "linked", "runs_here"),
    [
        ({"backend": "remote"}, [], "no"),
        ({"backend": "remote", "allow_paid_remote": True}, [], "no"),
        ({"backend": "auto"}, [], "yes"),
        ({"backend": "auto", "allow_paid_remote": True}, [], "maybe"),
        ({"backend": "auto"}, ["allow_paid_remote"], "maybe"),
        ({"backend": "local"}, [], "yes"),
        ({"backend": "local", "allow_paid_remote": True}, [], "yes"),
        ({"backend": "local"}, ["allow_paid_remote"], "yes"),
        ({"backend": "local"}, ["backend"], "maybe"),
    ],
)
def test_the_node_with_two_backends_has_a_price_where_it_may_be_paid_for(
    comfy, wiro, monkeypatch, changes, linked, runs_here
):
    wiro.price = listed()
    told = ask("SkyReelsI2V", linked, **changes)
    assert (told["is_free"], told["is_most"]) == (runs_here == "yes", runs_here == "maybe")
    assert told["price"] == (None if runs_here == "yes" else "0.3")
    assert len(wiro.seen) == (runs_here != "yes")
    monkeypatch.delenv("WIRO_API_KEY")
    assert ask("SkyReelsI2V", linked, **changes)["has_key"] == (runs_here == "yes")


def test_where_nothing_can_be_made_here_a_price_stands_on_the_node_if_and_only_if_it_is_paid(
    comfy, wiro
):
    wiro.price = listed()
    backends = SkyReelsI2V.INPUT_TYPES()["required"]["backend"][0]
    for take, (backend, is_allowed) in enumerate(itertools.product(backends, (False, True)), 1):
        widgets = {**EITHER, "backend": backend, "allow_paid_remote": is_allowed, "take": take}
        del widgets["size"]
        before = len(runs(wiro))
        with torch.inference_mode(), contextlib.suppress(OptionError):
            node = SkyReelsI2V()
            asyncio.run(node.generate(image=torch.zeros(1, 48, 64, 3), **widgets, unique_id="7"))
        is_paid = len(runs(wiro)) > before
        assert (ask("SkyReelsI2V", values=widgets)["price"] is not None) == is_paid, widgets
    assert len(runs(wiro)) == 3


def test_the_price_of_the_node_with_two_backends_is_that_of_its_size(comfy, wiro):
    wiro.price = [*listed("0.10", size="960x544"), *listed("0.05", size="544x960")]
    assert ask("SkyReelsI2V")["price"] == "0.1"
    assert ask("SkyReelsI2V", width=544, height=960)["price"] == "0.05"
    linked = ask("SkyReelsI2V", ["image", "width"])
    assert (linked["price"], linked["is_exact"]) == ("0.1", False)


def test_what_is_still_missing_hinders_no_price(comfy, wiro):
    wiro.price = listed()
    assert ask(prompt="", linked=[])["price"] == "0.3"
    assert ask("WiroRunModel", parameters="{}", linked=[])["price"] == "0.3"
    assert ask("WiroRunModel", parameters="", image_parameter="lastImage")["price"] == "0.3"


@pytest.mark.parametrize(
    ("node", "changes", "words"),
    [
        ("WiroRunModel", {"model": "acme/none"}, "acme/none"),
        ("WiroRunModel", {"model": "nonsense"}, "owner/project"),
        ("WiroRunModel", {"parameters": "{"}, "not valid JSON"),
        ("WiroRunModel", {"parameters": '{"callbackUrl": "x"}'}, "may not do that"),
        ("WiroRunModel", {"parameters": '{"odd": 1}'}, "no parameter 'odd'"),
        ("WiroRunModel", {"parameters": '{"size": "1x1"}'}, "choose one of"),
        ("WiroRunModel", {"linked": ["model"]}, "comes through a link"),
        ("WiroRemoteI2V", {"num_frames": 1}, "the least is 5"),
        ("WiroRemoteI2V", {"num_frames": "many"}, "wrong type"),
        ("WiroRunModel", {"parameters": 5}, "wrong type"),
        ("SkyReelsI2V", {"width": 64, "height": 64}, "960x544 and 544x960, and the clip is 64x64"),
        ("SkyReelsI2V", {"width": "x"}, "change width and height"),
        ("SkyReelsI2V", {"steps": 101}, "takes 1 to 100"),
    ],
)
def test_a_price_that_cannot_be_had_is_a_sentence(comfy, wiro, node, changes, words):
    wiro.price = listed()
    told = ask(node, **changes)
    assert (told["price"], told["has_key"]) == (None, True)
    assert words in told["problem"]
    assert KEY not in json.dumps(told)


def test_a_model_without_a_price_is_told_as_that_until_a_run_has_cost_something(comfy, wiro):
    assert ask()["price"] is None
    assert ask()["problem"] == ""


@pytest.mark.parametrize("body", [{}, {"node": "WiroRunModel"}, {"values": [], "linked": {}}])
def test_a_question_that_is_none_is_told(comfy, wiro, body):
    assert "reload the page" in prices.node_price(body)["problem"]


def test_a_quote_of_a_draft_checks_all_but_what_is_missing(comfy, wiro):
    with account.make_client() as client:
        model = Model.parse("wiro/SkyReels-V1")
        record = jobs.read_record(client, model)
    with pytest.raises(ConfigError, match="wants"):
        quote(record, Job(model, {"prompt": "x"}))
    assert quote(record, Job(model, {"prompt": "x"}), is_draft=True).parameters["prompt"] == "x"
    with pytest.raises(ConfigError, match="no parameter"):
        quote(record, Job(model, {"odd": 1}), is_draft=True)
