"""The parameters of a run: every key of the schema, checked before money is spent."""

import json

import pytest
from comfyui_skyreels.wiro_api.client import Model
from comfyui_skyreels.wiro_api.errors import ConfigError
from comfyui_skyreels.wiro_api.schema import SKYREELS, complete, frame_count, items_of
from support.wiro_client import MODEL
from support.wiro_server import PARAMETERS

PICTURE = ("inputImage", ("input.png", b"\x89PNG", "image/png"))
A, B = "https://x.example/a.png", "https://x.example/b.png"
ALL_TYPES = [
    {"id": "title", "type": "text", "default": "untitled"},
    {"id": "story", "type": "textarea"},
    {"id": "style", "type": "select", "options": [{"value": 1}, {"value": "two"}], "default": 1},
    {"id": "strength", "type": "range", "min": "0", "max": "1", "default": "0.5"},
    {"id": "count", "type": "number", "default": 4},
    {"id": "weight", "type": "float"},
    {"id": "first", "type": "fileinput"},
    {"id": "more", "type": "multifileinput"},
    {"id": "mixed", "type": "combinefileinput"},
    {"id": "new", "type": "type-of-tomorrow", "default": {"a": 1}},
]


def whole(item, value):
    """The value of a parameter that is alone in its schema."""
    return complete([{"id": "x", **item}], {"x": value})["x"]


# --- all keys -----------------------------------------------------------------------------------


def test_nothing_given_sends_every_key_but_numbers_and_lists_that_have_no_value():
    assert complete(ALL_TYPES, {}) == {
        "title": "untitled", "story": "", "style": "1", "strength": 0.5, "count": 4,
        "firstUrl": "", "moreUrl": "", "new": {"a": 1},
    }  # fmt: skip


def test_everything_given_is_sent_as_given():
    given = {
        "title": "", "story": "once", "style": "two", "strength": 1, "count": "12",
        "weight": "0.25", "firstUrl": A, "moreUrl": f"{A},{B}", "mixed": [A, B], "new": [1],
    }  # fmt: skip
    assert complete(ALL_TYPES, given) == {**given, "count": 12, "weight": 0.25}


def test_an_empty_number_is_the_default_of_its_model():
    assert complete(ALL_TYPES, {"count": "", "strength": None})["count"] == 4
    assert complete(ALL_TYPES, {"count": "", "strength": None})["strength"] == 0.5


def test_an_unset_number_is_never_sent_as_0():
    assert "weight" not in complete(ALL_TYPES, {"weight": ""})


def test_the_service_schema_and_the_known_one_make_the_same_run_of_skyreels():
    given = {"prompt": "FPS-24, waves", "size": "544x960"}
    expected = {
        "inputImageUrl": "", "prompt": "FPS-24, waves", "negativePrompt": "", "scale": 6.0,
        "numFrames": 97, "size": "544x960", "steps": 30,
    }  # fmt: skip
    for record in ({"parameters": PARAMETERS}, {"parameters": None}, {}):
        assert complete(items_of(record, MODEL), given, [PICTURE]) == expected


def test_the_known_parameters_are_of_skyreels_alone():
    assert items_of({}, Model("WIRO", "skyreels-v1")) == items_of({}, SKYREELS)
    assert items_of({}, Model("wiro", "other")) == []
    assert items_of({}) == []
    assert complete([], {"any": "thing"}) == {"any": "thing"}


@pytest.mark.parametrize(
    "parameters",
    ["text", 5, {}, [None, 3, "x", {}], [{"items": None}], [{"items": [None, {}, {"id": ""}]}],
     [{"items": 5}]],
)  # fmt: skip
def test_a_schema_that_is_none_lists_nothing(parameters):
    assert items_of({"parameters": parameters}) == []


def test_the_common_fields_are_sent_only_if_given():
    items = [{"id": "prompt", "type": "text"}]
    given = {"prompt": "x", "callbackUrl": "https://x.example/cb", "projectid": "7"}
    assert complete(items, given) == given
    assert set(complete(items, {})) == {"prompt"}


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": 1}, "no parameter 'seed': it knows .*numFrames.*Nothing was sent"),
        ({"inputimage": A}, "no parameter 'inputimage'"),
        ({"prompt": ""}, "wants prompt, which is empty: fill it in"),
        ({"prompt": None}, "wants prompt"),
        ({"size": ""}, "wants size, which is empty: choose one of 960x544, 544x960"),
        ({"size": "640x480"}, "size is '640x480': choose one of 960x544, 544x960"),
        ({"steps": "many"}, "steps is 'many', which is not a number"),
        ({"steps": float("nan")}, "not a number"),
        ({"steps": True}, "not a number"),
        ({"steps": 0}, "steps is 0, and the model takes 1 to 100"),
        ({"steps": 101}, "the model takes 1 to 100"),
        ({"scale": "20.5"}, "scale is 20.5, and the model takes 1 to 20"),
    ],
)
def test_a_value_the_model_does_not_take_is_one_sentence(values, words):
    given = {"prompt": "x", "size": "960x544", **values}
    with pytest.raises(ConfigError, match=words):
        complete(items_of({"parameters": PARAMETERS}), given, [PICTURE])


def test_a_required_parameter_without_default_must_be_given():
    for kind in ("text", "select", "number", "type-of-tomorrow"):
        with pytest.raises(ConfigError, match="wants x"):
            complete([{"id": "x", "type": kind, "required": True}], {})
    assert complete([{"id": "x", "type": "text", "required": True, "default": "d"}], {}) == {
        "x": "d"
    }


def test_the_ends_of_a_range_are_in_it_and_an_unfilled_one_bounds_nothing():
    steps = {"type": "range", "min": 1, "max": "100"}
    assert [whole(steps, value) for value in (1, "100")] == [1, 100]
    assert whole({"type": "range", "min": 0, "max": 0}, 5000) == 5000
    assert whole({"type": "range", "min": None, "max": 3}, 5000) == 5000


# --- values as the wire wants them --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["range", "number", "float"])
@pytest.mark.parametrize(
    ("given", "sent"),
    [("97", 97), (" 97 ", 97), ("97.0", 97), ("6.5", 6.5), ("1e2", 100), (97, 97), (6.0, 6.0),
     ("-1", -1), (0, 0)],
)  # fmt: skip
def test_numbers_leave_as_numbers(kind, given, sent):
    number = whole({"type": kind}, given)
    assert json.dumps(number) == json.dumps(sent)


def test_a_choice_leaves_as_text():
    assert whole({"type": "select", "options": [{"value": 5}]}, 5) == "5"
    assert whole({"type": "select", "options": []}, 5) == "5"


# --- files, spec 9.3 ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fileinput", "multifileinput"])
def test_an_address_stands_in_the_url_field_and_beside_a_file_that_is_empty(kind):
    items = [{"id": "inputImage", "type": kind, "required": True}]
    assert complete(items, {"inputImageUrl": A}) == {"inputImageUrl": A}
    assert complete(items, {"inputImage": A}) == {"inputImageUrl": A}
    assert complete(items, {}, [PICTURE]) == {"inputImageUrl": ""}


def test_several_addresses_of_a_multifileinput_are_one_text_with_commas():
    items = [{"id": "inputImage", "type": "multifileinput"}]
    for given in (f"{A},{B}", [A, B]):
        assert complete(items, {"inputImage": given}) == {"inputImageUrl": f"{A},{B}"}


def test_a_combinefileinput_takes_a_list_and_has_no_url_field():
    items = [{"id": "inputImage", "type": "combinefileinput"}]
    assert complete(items, {"inputImage": A}) == {"inputImage": [A]}
    assert complete(items, {"inputImage": [A, B]}) == {"inputImage": [A, B]}
    assert complete(items, {}, [PICTURE]) == {}
    with pytest.raises(ConfigError, match="no parameter 'inputImageUrl'"):
        complete(items, {"inputImageUrl": A})


def test_the_addresses_of_a_combinefileinput_go_as_parts_of_their_own_beside_files(server, client):
    items = [{"id": "inputImage", "type": "combinefileinput"}, {"id": "prompt", "type": "text"}]
    values = complete(items, {"inputImage": [A, B], "prompt": "x"}, [PICTURE])
    client.run(MODEL, values, [PICTURE])
    _, seen = server.seen
    assert seen.raw.count(b'name="inputImage"\r\n') == 2
    assert seen.raw.count(b'name="inputImage"; filename="input.png"\r\n') == 1


@pytest.mark.parametrize("kind", ["fileinput", "multifileinput", "combinefileinput"])
def test_a_required_file_must_come_somehow(kind):
    items = [{"id": "inputImage", "type": kind, "required": True}]
    with pytest.raises(ConfigError, match="wants a file for inputImage"):
        complete(items, {})
    with pytest.raises(ConfigError, match="no parameter 'other'"):
        complete(items, {"inputImage": A}, [("other", PICTURE[1])])


# --- frames -------------------------------------------------------------------------------------


def test_counts_of_frames_are_rounded_up_to_4k_plus_1():
    asked = (5, 6, 8, 9, 93, 94, 96, 97, 98, 101, 289)
    assert [frame_count(n) for n in asked] == [5, 9, 9, 9, 93, 97, 97, 97, 101, 101, 289]


@pytest.mark.parametrize("count", [4, 1, 0, -3])
def test_fewer_than_5_frames_are_refused(count):
    with pytest.raises(ConfigError, match="the least is 5"):
        frame_count(count)
