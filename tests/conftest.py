"""The fixtures of all tests; `comfyui_skyreels.py` beside it is the pack, loaded by path."""

import atexit
import functools
import gc
import itertools
import logging
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for comfyui_skyreels, support, bench and train
from support.checkout import Checkout, parameters
from support.log import Log
from support.memory import keep_memory

ROOT = Path(__file__).resolve().parent.parent
FOLDER_NUMBERS = itertools.count()
FRAMES_OF_A_REPORT = 200
#: files of more than three seconds, by what they take
LONGEST = (
    "engine/pipeline/test_ray_batch.py", "engine/test_cli.py", "adapters/local/test_nodes.py",
    "engine/test_builtin.py", "client/test_hostile.py", "engine/test_gpu_check.py",
    "adapters/remote/test_batch.py", "test_package.py", "engine/weights/test_load.py",
    "engine/transformer/test_attention.py", "engine/kernels/test_kernels.py",
    "client/test_lost_runs.py", "engine/vae/test_tiling.py", "engine/pipeline/test_batch.py",
    "engine/vae/test_strips.py", "engine/transformer/test_ulysses.py",
    "engine/sampling/test_sample.py", "adapters/remote/test_nodes.py", "engine/test_plan.py",
    "client/test_transport.py", "test_workflows.py", "engine/transformer/test_quant.py",
    "adapters/remote/test_outputs.py", "client/test_wiro_cli.py",
    "engine/transformer/test_placement.py", "train/test_train.py", "client/test_schedules.py",
    "engine/runtime/test_ladder.py", "client/test_faults.py", "engine/sampling/test_step_cache.py",
    "engine/sampling/test_pair.py", "engine/vae/test_vae.py", "engine/test_odd_files.py",
    "engine/pipeline/test_extend.py", "engine/sampling/test_planned.py",
    "engine/kernels/test_sparse.py", "engine/pipeline/test_remote.py", "engine/vae/test_exact.py",
    "engine/vae/test_synced.py", "engine/sampling/test_bad_render.py",
    "engine/kernels/test_sparse_kernel.py", "engine/sampling/test_branches.py",
    "adapters/test_contract.py", "engine/weights/lora/test_apply.py",
    "adapters/remote/test_page.py", "engine/sampling/test_replay.py",
    "adapters/remote/test_models.py", "engine/vae/test_budget.py", "client/test_downloads.py",
    "engine/weights/lora/test_runs.py", "client/test_websocket.py", "test_layout.py",
    "engine/sampling/test_prompts.py", "engine/vae/test_encode.py", "client/test_acceptance.py",
    "engine/transformer/test_sparse_attention.py", "adapters/local/test_lora_node.py",
)  # fmt: skip
if "PYTEST_XDIST_WORKER" in os.environ:
    # threads of several processes that wait for one another on the same cores are slower than one
    os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
    torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


def interrupt(number, frame) -> None:
    signal.default_int_handler(number, frame)


def pytest_configure(config) -> None:
    keep_memory()
    # with Python's own handler asyncio.run sets another, and Python prints what it has replaced:
    # each time, with the task that has ended and all tensors that it returned
    signal.signal(signal.SIGINT, interrupt)
    logging.root.addHandler(logging.NullHandler())  # or Python's own writes to standard error
    config.option.loadscopereorder = False  # xdist would start the files with most tests first
    gc.freeze()  # where workers collect; the end, too, searches for garbage: ten times
    atexit.register(gc.unfreeze)  # the interpreter's own end takes everything apart


def pytest_sessionstart() -> None:
    """Let garbage be reported where it is found, also at the limit of recursion.

    Tests of nested input go there; whatever another test has left may be collected in their midst,
    and pytest needs a few frames to take note of it.
    """
    note = sys.unraisablehook

    def noted(unraisable) -> None:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + FRAMES_OF_A_REPORT)
        try:
            note(unraisable)
        finally:
            sys.setrecursionlimit(limit)

    sys.unraisablehook = noted


def pytest_collection_finish() -> None:
    """What has been imported stays: no search for garbage need look through it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items) -> None:
    """Start the longest files first, so that no worker is alone with one at the end."""
    starts = {name: index for index, name in enumerate(LONGEST)}
    folder = ROOT / "tests"
    items.sort(key=lambda item: starts.get(item.path.relative_to(folder).as_posix(), len(LONGEST)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    # torch.manual_seed formats a stack for each kind of GPU that is not there: 2 ms a test
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@functools.lru_cache(maxsize=1)
def own_names(_count: int) -> list[str]:
    """Our loggers and those above them, of all that there are."""
    own = ("skyreels", "wiro_api", "comfyui_skyreels")
    return [name for name in logging.root.manager.loggerDict if name.startswith(own)]


@pytest.fixture(autouse=True)
def levels_kept():
    """What one test makes our loggers say is not said in the next."""
    named = logging.root.manager.loggerDict
    loggers = [named[name] for name in own_names(len(named))]
    levels = [(each, each.level) for each in loggers if isinstance(each, logging.Logger)]
    yield
    assert [(each, each.level) for each, _ in levels] == levels


@pytest.fixture
def caplog():
    """What is logged (support/log.py)."""
    log = Log()
    logging.root.addHandler(log)
    yield log
    logging.root.removeHandler(log)
    log.restore()


@pytest.fixture
def tmp_path(request, tmp_path_factory) -> Path:
    """As pytest's own, which looks through the folders of all tests so far for the next number."""
    name = re.sub(r"\W", "_", request.node.name)[:30]
    path = tmp_path_factory.getbasetemp() / f"{name}{next(FOLDER_NUMBERS)}"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path_factory) -> None:
    """No test finds or leaves anything in the journal of who runs it, or waits for its disk."""
    monkeypatch.setattr("comfyui_skyreels.wiro_api.journal.SYNCHRONOUS", "OFF")
    monkeypatch.delenv("WIRO_STATE_DIR", raising=False)
    folder = tmp_path_factory.getbasetemp() / "states" / str(next(FOLDER_NUMBERS))
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(folder / name))


@pytest.fixture(scope="module")
def few_objects():
    """Where memory runs out often: each time, garbage is looked for among all objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def fast_convolutions():
    """For modules that decode many small clips (support/convolutions.py)."""
    from support import convolutions

    with convolutions.fast_convolutions():
        yield


#: loader of a part of the built-in model -> the module of the nodes that calls it
NODES_LOADERS = {
    "builtin_transformer": "loaders", "builtin_vae": "loaders", "builtin_text_encoder": "text"
}  # fmt: skip


@functools.cache
def kept_loaders() -> dict:
    from comfyui_skyreels.skyreels import builtin
    from support.kept import kept

    return {name: kept(getattr(builtin, name)) for name in NODES_LOADERS}


@pytest.fixture
def kept_models(monkeypatch):
    """For modules that use the built-in model often: it is read once (support/kept.py)."""
    for name, load in kept_loaders().items():
        monkeypatch.setattr(f"comfyui_skyreels.skyreels.builtin.{name}", load)
        nodes = NODES_LOADERS[name]
        monkeypatch.setattr(f"comfyui_skyreels.nodes.local.{nodes}.{name}", load)


@pytest.fixture(scope="module", params=parameters())
def checkout(request) -> Checkout:
    """Each real ComfyUI there is."""
    return request.param


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """A ComfyUI of stand-ins (support/host.py); its models, user files and records are in it."""
    from support import host

    comfy = host.Host(tmp_path / "comfyui")
    for name, module in host.stand_ins(comfy).items():
        monkeypatch.setitem(sys.modules, name, module)
    return comfy


@pytest.fixture
def wiro(monkeypatch):
    """A loopback Wiro whose tasks end at once with a small video; its key is in the environment."""
    from comfyui_skyreels.nodes.remote import run as wiro_run
    from support.clip import make_clip
    from support.wiro_server import KEY, SECRET, WiroServer

    wiro_run._records.clear()
    monkeypatch.delenv("WIRO_SOCKET_URL", raising=False)
    with WiroServer(states=("task_postprocess_end",), schema=True) as server:
        server.files["0.mp4"] = make_clip(5, 48, 32)
        monkeypatch.setenv("WIRO_API_KEY", KEY)
        monkeypatch.setenv("WIRO_API_SECRET", SECRET)
        monkeypatch.setenv("WIRO_API_BASE_URL", server.url)
        yield server
