"""Any model: the files its node sends; the page's list, form and price."""

import asyncio
import io
import json
import sys
import wave
from types import ModuleType, SimpleNamespace

import pytest
import torch
from comfyui_skyreels.nodes import host
from comfyui_skyreels.nodes.remote import account, inputs, models, prices, routes
from comfyui_skyreels.nodes.remote import nodes as remote
from comfyui_skyreels.nodes.remote import run as wiro_run
from comfyui_skyreels.nodes.remote.guard import PAGE_HEADER
from comfyui_skyreels.nodes.remote.inputs import (
    SOCKETS,
    Slot,
    assign_sockets,
    parse_assignments,
    slots_of,
)
from comfyui_skyreels.wiro_api.client import Model
from comfyui_skyreels.wiro_api.errors import ConfigError, WiroError
from comfyui_skyreels.wiro_api.jobs import Job, job_key
from PIL import Image
from support.host import VideoFromComponents, VideoFromFile
from support.wiro_server import KEY, MODELS, SECRET

FRAMES, LIPS = "wiro/first-last-frame", "wiro/lip-sync"
HOST = "127.0.0.1:8188"
PAGE = {"Host": HOST, PAGE_HEADER: "1"}
MP4 = b"\0\0\0\x18ftypisom" + bytes(100)


@pytest.fixture(autouse=True)
def forgotten():
    models._searches.clear()


@pytest.fixture
def more(wiro):
    """The loopback Wiro with further models."""
    wiro.models = json.loads(json.dumps(MODELS))
    wiro.models[LIPS]["dynamicprice"] = [{"inputs": [], "price": "0.10", "priceMethod": "cpr"}]
    return wiro


def pictures(count=1, level=0.5) -> torch.Tensor:
    return torch.full((count, 4, 6, 3), level) + torch.arange(count).reshape(-1, 1, 1, 1) / 10


def sound(seconds=0.1, channels=2, count=1) -> dict:
    length = int(8000 * seconds)
    return {
        "waveform": torch.linspace(-2, 2, length).expand(count, channels, length),
        "sample_rate": 8000,
    }


def run_model(slug, values=None, **inputs):
    with torch.inference_mode():
        return asyncio.run(
            remote.WiroRunModel().run(
                slug,
                json.dumps({"prompt": "x"} if values is None else values),
                **inputs,
                unique_id="7",
            )
        )


def sent(server):
    """The body, and the (parameter, filename, type) and contents of the files, of the only Run."""
    (run,) = [seen for seen in server.seen if seen.path.startswith("Run/")]
    return run.body, [file[:3] for file in run.files], [file[3] for file in run.files]


# --- what is sent -------------------------------------------------------------------------------


def test_pictures_go_to_the_models_parameters_in_order(comfy, more):
    run_model(
        FRAMES,
        image=pictures(),
        image_2=pictures(level=0.1),
        image_3=pictures(3, 0.2),
        image_4=pictures(2, 0.6),
    )
    body, files, contents = sent(more)
    names = ["firstFrame", "lastFrame", *["references"] * 5]
    assert files == [(name, "input.png", "image/png") for name in names]
    levels = [Image.open(io.BytesIO(content)).getpixel((0, 0))[0] for content in contents]
    assert [round(level / 25.5) for level in levels] == [5, 1, 2, 3, 4, 6, 7]
    assert (body["firstFrameUrl"], body["lastFrameUrl"], body["referencesUrl"]) == ("", "", "")
    assert (body["resolution"], body["strength"]) == ("480p", "0.5"), "defaults"


def test_a_film_and_a_sound_go_where_the_names_say_so(comfy, more, tmp_path):
    film = tmp_path / "a film.mp4"
    film.write_bytes(MP4)
    run_model(LIPS, video=VideoFromFile(str(film)), audio=sound(), image_2=pictures(2))
    body, files, (*faces, video, audio) = sent(more)
    assert files == [
        ("faces", "input.png", "image/png"),
        ("faces", "input.png", "image/png"),
        ("inputVideo", "input.mp4", "video/mp4"),
        ("inputAudio", "input.wav", "audio/wav"),
    ]
    assert len(set(faces)) == 2
    assert video == MP4, "as it is"
    with wave.open(io.BytesIO(audio)) as heard:
        assert (heard.getnchannels(), heard.getsampwidth(), heard.getframerate()) == (2, 2, 8000)
        samples = torch.frombuffer(bytearray(heard.readframes(800)), dtype=torch.int16)
    assert (samples.shape, int(samples.min()), int(samples.max())) == ((1600,), -32767, 32767)
    assert "facesUrl" not in body
    assert (body["inputVideoUrl"], body["inputAudioUrl"]) == ("", "")


def test_what_is_written_in_file_parameters_goes_there(comfy, more):
    places = "image=references, image_2 = lastFrame\nimage_3=firstFrame"
    run_model(
        FRAMES,
        image=pictures(2, 0.1),
        image_2=pictures(level=0.3),
        image_3=pictures(level=0.4),
        file_parameters=places,
    )
    _, files, contents = sent(more)
    assert [name for name, *_ in files] == ["references", "references", "lastFrame", "firstFrame"]
    assert len(set(contents)) == 4


def test_addresses_stand_beside_files_and_keep_their_parameter(comfy, more):
    url = "https://cdn.wiro.ai/a.png"
    run_model(
        FRAMES,
        {"prompt": "x", "firstFrameUrl": url, "referencesUrl": f"{url},{url}"},
        image_2=pictures(),
        image_3=pictures(level=0.2),
    )
    body, files, _ = sent(more)
    assert [name for name, *_ in files] == ["lastFrame", "references"]
    assert (body["firstFrameUrl"], body["referencesUrl"]) == (url, f"{url},{url}")


def test_files_of_a_combined_parameter_mix_with_addresses(comfy, more):
    film = VideoFromFile(io.BytesIO(b"\x1aE\xdf\xa3....webm...."))
    values = {"prompt": "x", "faces": ["https://cdn.wiro.ai/f.png"]}
    run_model(LIPS, values, video=film, audio=sound(), image_2=pictures())
    body, files, _ = sent(more)
    assert body["faces"] == "https://cdn.wiro.ai/f.png"
    assert files[:2] == [
        ("faces", "input.png", "image/png"),
        ("inputVideo", "input.webm", "video/webm"),
    ]


def test_of_a_batch_for_one_place_the_first_is_sent_and_it_is_said(comfy, more, caplog):
    run_model(FRAMES, image=pictures(), image_2=pictures(3, 0.2))
    assert [name for name, *_ in sent(more)[1]] == ["firstFrame", "lastFrame"]
    assert "image_2 holds 3, but lastFrame takes one" in caplog.text


def test_a_part_of_a_film_is_encoded_and_frames_too(comfy, more):
    film = VideoFromFile("/not/read.mp4")
    film.window = (1.0, 2.0)
    run_model(LIPS, video=film, audio=sound())
    assert sent(more)[2][0].endswith(b"a part")


def test_a_film_of_frames_is_the_same_job_however_it_is_encoded(comfy, more):
    film = {"images": torch.rand(3, 4, 4, 3), "audio": sound()}
    tasks = [
        run_model(LIPS, video=VideoFromComponents(**changes), audio=sound())[3]
        for changes in (
            film,
            film,
            {**film, "frame_rate": 12.0},
            {**film, "audio": None},
            {**film, "images": film["images"].flip(0)},
        )
    ]
    assert tasks == ["2221", "2221", "2222", "2223", "2224"]
    assert VideoFromComponents.encoded >= 5


@pytest.mark.parametrize("image", [pictures(), pictures(3)])
@pytest.mark.parametrize("extra", [{}, {"file_parameters": ""}, {"image_parameter": "inputImage"}])
def test_the_job_of_a_node_of_before_is_the_same(comfy, wiro, image, extra):
    values = {"prompt": "x", "size": "960x544"}
    part = inputs.png_part(image)
    key = job_key(
        Job(Model("wiro", "SkyReels-V1"), values, [("inputImage", part)]), service=wiro.url
    )
    entry = account.journal().begin(key, "wiro/SkyReels-V1")
    account.journal().mark_sending(entry)
    account.journal().mark_started(entry.id, wiro.add_task({"prompt": "x"}))
    assert run_model("wiro/SkyReels-V1", values, image=image, **extra)[3] == "2221"
    assert not [path for path in wiro.paths() if path.startswith("Run/")]


@pytest.mark.parametrize(
    ("slug", "inputs", "words"),
    [
        (
            FRAMES,
            {"audio": sound()},
            "takes audio.*firstFrame .one., lastFrame .one., references "
            ".several.*image_2=lastImage",
        ),
        (FRAMES, {"video": VideoFromFile(io.BytesIO(MP4))}, "parameter takes video"),
        (FRAMES, {"image": pictures(), "file_parameters": "image=prompt"}, "'prompt', which takes"),
        (FRAMES, {"file_parameters": "image_2=lastFrame"}, "is not connected"),
        (
            FRAMES,
            {
                "image": pictures(),
                "image_2": pictures(),
                "image_3": pictures(),
                "file_parameters": "image_2=lastFrame,image_3=lastFrame",
            },
            "is assigned several",
        ),
        (FRAMES, {"file_parameters": "lastFrame"}, "write input=parameter"),
        (FRAMES, {"file_parameters": "mask=lastFrame"}, "inputs are image, image_2"),
        (FRAMES, {"file_parameters": "image=a,image=b"}, "twice"),
        (
            LIPS,
            {"audio": {"waveform": torch.zeros(1, 2, 0), "sample_rate": 8000}},
            "audio is empty",
        ),
        (LIPS, {"audio": {"waveform": torch.zeros(0, 2, 5), "sample_rate": 8000}}, "batch of 0"),
        (LIPS, {"video": VideoFromFile(io.BytesIO())}, "video has 0 bytes"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_costs_nothing(comfy, more, slug, inputs, words):
    with pytest.raises(WiroError, match=words):
        run_model(slug, **inputs)
    assert more.tasks == {}
    assert all(len(text) > 20 for text in comfy.texts[-1:]), "on the node"


def test_files_over_100_mb_are_refused_in_words(comfy, more, monkeypatch):
    from comfyui_skyreels.wiro_api import files

    monkeypatch.setattr(files, "MAX_UPLOAD_BYTES", 50)
    for connected, words in [
        ({"video": VideoFromFile(io.BytesIO(MP4))}, "video has more than 50 bytes"),
        ({"audio": sound()}, "MB as WAV; Wiro accepts"),
    ]:
        with pytest.raises(ConfigError, match=words):
            run_model(LIPS, **connected)
    assert more.tasks == {}


@pytest.mark.parametrize("name", ["callbackUrl", "WEB-HOOK", "project id"])
def test_files_go_to_nobody_elses_field(comfy, more, name):
    assert "somebody else" in remote.WiroRunModel.VALIDATE_INPUTS("{}", "", f"video={name}")
    more.models[FRAMES]["parameters"] = [{"items": [{"id": name, "type": "fileinput"}]}]
    with pytest.raises(WiroError, match="somebody else"):
        run_model(FRAMES, {}, image_2=pictures())
    assert more.tasks == {}


def test_cancel_before_the_files_are_sent_sends_nothing(comfy, more, monkeypatch):
    def stop(*_):
        comfy.is_cancelled = True
        return MP4, True

    monkeypatch.setattr(host, "video_bytes", stop)
    with pytest.raises(BaseException, match=r"^$"):
        run_model(LIPS, video=VideoFromFile("x"), audio=sound())
    assert more.tasks == {}


def test_places_are_never_guessed():
    """Whatever the model and whatever is connected: each file has a place that can take it."""
    slots = [
        Slot(f"p{i}", kind, many, required)
        for i, (kind, many, required) in enumerate(
            (kind, many, required)
            for kind in ("image", "video", "")
            for many in (0, 1)
            for required in (0, 1)
        )
    ]
    count = 0
    for first in slots:
        for second in slots:
            for bits in range(64):
                sockets = [name for i, name in enumerate(SOCKETS) if bits >> i & 1]
                model = list(dict.fromkeys([first, second]))
                try:
                    found = assign_sockets(sockets, {}, model, {})
                except ConfigError as error:
                    assert "file_parameters" in str(error)
                    continue
                count += 1
                by_name = {slot.name: slot for slot in model}
                assert list(found) == sockets
                for socket, name in found.items():
                    kind = socket.partition("_")[0]
                    assert by_name[name].kind in (kind, "")
                    is_alone = list(found.values()).count(name) == 1
                    assert is_alone or by_name[name].takes_many
    assert count > 500


def test_names_tell_what_a_parameter_takes():
    items = [
        ("inputImage", ""),
        ("inputVideo", ""),
        ("voice", ""),
        ("file", "Reference photo"),
        ("file", ""),
        ("audioForVideo", ""),
        ("pdf", "Document"),
    ]
    slots = slots_of([{"id": i, "label": label, "type": "fileinput"} for i, label in items])
    assert [slot.kind for slot in slots] == ["image", "video", "audio", "image", "", "", "other"]
    assert parse_assignments(" image_2 = a ;video=b\n") == {"image_2": "a", "video": "b"}


# --- what the page is told ----------------------------------------------------------------------


@pytest.fixture
def ask(monkeypatch):
    """Ask a route as a page would; the answer is (status, object)."""
    aiohttp = ModuleType("aiohttp")
    aiohttp.web = SimpleNamespace(json_response=lambda body, status=200: (status, body))
    monkeypatch.setitem(sys.modules, "aiohttp", aiohttp)
    found = {}
    table = SimpleNamespace(
        get=lambda path: lambda function: found.setdefault(path, function),
        post=lambda path: lambda function: found.setdefault(path, function),
    )
    routes.register(table)

    async def chunks(body):
        yield json.dumps(body).encode()

    def ask(path, headers=PAGE, body=None, **query):
        request = SimpleNamespace(
            headers=headers,
            query=query,
            path=path,
            content_type="application/json",
            content=SimpleNamespace(iter_chunked=lambda _: chunks(body)),
        )
        return asyncio.run(found[f"{routes.PREFIX}/{path}"](request))

    return ask


def test_models_are_listed_and_the_answer_is_kept_for_ten_minutes(comfy, more, ask):
    status, answer = ask("models", search="frame")
    assert status == 200
    (model,) = answer["models"]
    assert model == {
        "slug": FRAMES,
        "title": "First and Last Frame",
        "price": "",
        "about": "A video between two pictures.",
        "image": "https://cdn.wiro.ai/first-last-frame.webp",
    }
    asked = len(more.seen)
    assert ask("models", search=" FRAME ")[1] == answer
    assert len(more.seen) == asked
    assert [m["slug"] for m in ask("models")[1]["models"]] == ["wiro/skyreels-v1", FRAMES, LIPS]


def test_a_model_is_described_for_the_form(comfy, more, ask):
    status, model = ask("models/one", slug=FRAMES)
    assert status == 200
    assert model["page"] == "https://wiro.ai/models/wiro/first-last-frame"
    assert [group["title"] for group in model["groups"]] == ["Inputs", "Settings"]
    (first, _, references, prompt), (resolution, strength, seed) = (
        group["items"] for group in model["groups"]
    )
    assert (first["is_required"], first["files"]) == (True, {"kind": "image", "takes_many": False})
    assert references["files"]["takes_many"] is True
    assert references["help"] == "Up to four pictures of the same person."
    assert (prompt["type"], prompt["files"]) == ("textarea", None)
    assert [option["value"] for option in resolution["options"]] == ["480p", "720p"]
    assert (strength["default"], strength["min"], strength["max"], strength["step"]) == (
        0.5,
        0,
        1,
        0.05,
    )
    assert seed["is_advanced"] is True
    assert model["examples"][1] == {"prompt": "a town from dusk to night", "seed": 7}
    asked = len(more.seen)
    ask("models/one", slug=FRAMES)
    assert len(more.seen) == asked


@pytest.mark.parametrize(
    ("values", "files", "told", "problem"),
    [
        ({"prompt": "x"}, 1, "$0.20", ""),
        ({"prompt": "x", "resolution": "720p"}, 1, "$0.45", ""),
        ({}, 0, "$0.20", "wants a file for firstFrame"),
        ({"resolution": "8k"}, 1, "", "wants prompt"),
        ({"prompt": "x", "seed": "many"}, 1, "$0.20", "not a number"),
        ({"prompt": "x", "steps": 3}, 1, "$0.20", "no parameter 'steps'"),
    ],
)
def test_the_price_is_that_of_the_values_now(comfy, more, ask, values, files, told, problem):
    headers = {"Host": HOST, "Origin": f"http://{HOST}"}
    body = {"slug": FRAMES, "parameters": values, "files": files}
    status, answer = ask("models/price", headers, body)
    assert (status, answer["price"]) == (200, told)
    assert problem in answer["problem"]
    assert bool(problem) is bool(answer["problem"])
    assert answer["source"] == (
        "Wiro's price list." if told else "Wiro does not publish it before the run."
    )
    assert "limit $2.00 a run" in answer["limits"]
    assert more.tasks == {}
    assert not (comfy.root / "user").exists(), "asking makes no file"


def test_the_price_of_earlier_runs_is_told_as_that(comfy, more, ask):
    del more.models[LIPS]["dynamicprice"]
    file = account.limits_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")  # no limit: this model has no price
    run_model(LIPS, video=VideoFromFile(io.BytesIO(MP4)), audio=sound())
    body = {"slug": LIPS, "parameters": {"prompt": "x"}, "files": 2}
    answer = ask("models/price", {"Host": HOST, "Origin": f"http://{HOST}"}, body)[1]
    assert (answer["price"], "of yours cost" in answer["source"]) == ("about $0.00351", True)


ELSEWHERE = [
    {},
    {"Host": HOST},  # a picture in a foreign page, where the browser says nothing
    {"Host": HOST, "Sec-Fetch-Site": "cross-site"},
    {**PAGE, "Sec-Fetch-Site": "cross-site"},
    {**PAGE, "Sec-Fetch-Site": "same-site"},
    {**PAGE, "Sec-Fetch-Site": "none"},
    {**PAGE, "Origin": "https://evil.example"},
    {**PAGE, "Origin": "null"},
    {**PAGE, "Origin": "http://127.0.0.1:8189"},
    {**PAGE, "Host": "evil.example:8188"},  # a name that points here
    {**PAGE, "Host": ""},
    {**PAGE, "Host": "a@b"},
    {PAGE_HEADER: "1"},
]


@pytest.mark.parametrize("headers", ELSEWHERE, ids=str)
@pytest.mark.parametrize("path", ["models", "models/one"])
def test_no_other_page_makes_the_server_ask_wiro(comfy, more, ask, path, headers):
    status, answer = ask(path, headers, search="x", slug=FRAMES)
    assert (status, list(answer)) == (403, ["error"])
    assert more.seen == []


@pytest.mark.parametrize(
    "headers",
    [
        PAGE,
        {**PAGE, "Sec-Fetch-Site": "same-origin"},
        {**PAGE, "Origin": f"http://{HOST}"},
        {**PAGE, "Host": "localhost:8188"},
        {**PAGE, "Host": "[::1]:8188"},
        {PAGE_HEADER.lower(): "1", "host": "192.168.1.7"},
    ],
)
def test_the_page_itself_may_ask(comfy, more, ask, headers):
    assert ask("models", headers)[0] == 200


@pytest.mark.parametrize(
    ("path", "query", "status", "words"),
    [
        ("models/one", {"slug": "wiro/nothing"}, 502, "has no model wiro/nothing"),
        ("models/one", {"slug": "nothing"}, 400, "owner/project"),
        ("models/one", {}, 400, "owner/project"),
        ("models/one", {"slug": "a/" + "x" * 200}, 400, "at most 200"),
        ("models", {"search": "x" * 201}, 400, "at most 200"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(comfy, more, ask, path, query, status, words):
    answer = ask(path, **query)
    assert answer[0] == status
    assert words in answer[1]["error"]


def test_without_a_key_the_page_is_told_where_to_put_it(comfy, more, ask, monkeypatch):
    monkeypatch.delenv("WIRO_API_KEY")
    status, answer = ask("models")
    assert status == 400
    assert "Settings > SkyReels > Wiro" in answer["error"]


NONSENSE = [
    None,
    True,
    False,
    0,
    -1,
    0.5,
    1e300,
    10**30,
    float("inf"),
    float("nan"),
    "",
    " ",
    "x" * 300_000,
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "\ud800",
    "\x1b[31m",
    "\u202e",
    "__proto__",
    "callbackUrl",
    "../..",
    "a/b/c",
    "1e999",
    "NaN",
    "[",
    "{}",
    "null",
    [],
    {},
    [[]],
    [None],
    [{}],
    [[[[[[]]]]]],
    {"a": {}},
    {"id": []},
    {"value": {}},
    {"parameters": 7},
    ["x" * 9000] * 30,
    [{"id": "a"}] * 600,
    [{"value": 1}, {"value": None}, 7],
    [1, "a", {}],
    {"items": "x"},
]
assert len(NONSENSE) >= 40
ITEM = {
    "id": "a",
    "type": "select",
    "label": "A",
    "note": "n",
    "description": "d",
    "default": "x",
    "placeholder": "p",
    "required": True,
    "advanced": True,
    "min": 0,
    "max": 1,
    "step": 1,
    "options": [{"label": "X", "value": "x"}],
}
RECORD = {
    "title": "T",
    "description": "D",
    "image": "https://cdn.wiro.ai/x.png",
    "dynamicprice": "[]",
    "cps": "1",
    "approximatelycost": "1",
    "slugowner": "o",
    "slugproject": "p",
    "cleanslugowner": "o",
    "cleanslugproject": "p",
    "samples": [{"a": "x"}],
    "inspire": [],
    "parameters": [{"title": "G", "items": [ITEM]}],
}


@pytest.mark.parametrize("field", [*RECORD, *(f"item.{name}" for name in ITEM)])
def test_whatever_a_model_says_of_itself_the_answer_is_bounded_and_plain(
    comfy, wiro, monkeypatch, field
):
    for nonsense in NONSENSE:
        record = {**RECORD, field: nonsense}
        if field.startswith("item."):
            item = {**ITEM, field.removeprefix("item."): nonsense}
            record = {**RECORD, "parameters": [{"title": "G", "items": [item]}]}
        for module in (models, prices):
            monkeypatch.setattr(module, "model_record", lambda *_, record=record: record)
        answer = models.describe("o/p")
        text = json.dumps(answer, allow_nan=False)
        assert len(text) < 400_000
        assert answer["image"] in ("", "https://cdn.wiro.ai/x.png")
        assert answer["page"] == "https://wiro.ai/models/o/p"
        assert all(isinstance(answer[name], str) for name in ("title", "about", "price", "slug"))
        json.dumps(
            prices.form_price({"slug": "o/p", "parameters": {}, "files": 1}), allow_nan=False
        )


def test_all_nonsense_at_once_is_bounded_too(comfy, wiro, monkeypatch):
    long = "x" * 5000
    options = [{"label": long, "value": "v" * 900}] * 3000
    items = [{**ITEM, "id": f"p{i}", "options": options, "note": long} for i in range(2000)]
    record = {
        **RECORD,
        "parameters": [{"title": long, "items": items}],
        "samples": [{f"p{i}": "y" * 4000 for i in range(2000)}] * 90,
    }
    monkeypatch.setattr(models, "model_record", lambda *_: record)
    assert len(json.dumps(models.describe("o/p"))) < 8_000_000


@pytest.mark.parametrize(
    "address",
    [
        "http://cdn.wiro.ai/x.png",
        "https://wiro.ai.evil.example/x.png",
        "https://evil.example/x",
        "https://a@cdn.wiro.ai/x",
        "https://cdn.wiro.ai:8443/x",
        "//cdn.wiro.ai/x",
        "data:image/png,x",
        "javascript:alert(1)",
        "https://cdn.wiro.ai\\@evil.example/x",
        "https://xwiro.ai/x",
        "https://cdn.wiro.ai/\n",
        "https://[/x",
        "https://cdn.w\u0456ro.ai/x",
    ],
)
def test_pictures_come_from_the_service_alone(address):
    assert models._picture(address) == ""


def test_nothing_secret_is_told_and_little_is_remembered(comfy, more, ask, monkeypatch):
    secret = {"accesskey": "access-secret", "socketaccesstoken": "token-secret", "uuid": "user-1"}
    more.models[FRAMES] |= secret
    more.models[FRAMES]["inspire"][0] |= {**secret, "callbackUrl": "https://evil.example"}
    told = json.dumps([ask("models"), ask("models/one", slug=FRAMES)])
    for word in (KEY, SECRET, *secret.values(), "evil"):
        assert word not in told
    monkeypatch.setattr(models, "MAX_SEARCHES", 3)
    for number in range(6):
        ask("models", search=f"n{number}")
    assert len(models._searches) == 3
    wiro_run._records.clear()
    client = SimpleNamespace(base_url="", model_detail=lambda model: {"title": str(model)})
    for number in range(2 * wiro_run.KEPT_RECORDS):
        wiro_run.model_record(client, Model("a", str(number)))
    assert len(wiro_run._records) == wiro_run.KEPT_RECORDS
