"""Programs as processes of their own, without the seconds in which each would import the same.

`forks(module)` is one interpreter that has imported a module; each program is a fork of it. With
several modules it is itself a fork, of the one that has imported all but the last of them.
Everything else is as with `python -m` and `python -c`: its own memory, environment, output, signals
and exit code. Where there are no forks (Windows) each program is a new interpreter.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: after which a program has hung
LIMIT_S = 300.0
#: code of a program: a made-up `prompt` of the built-in model, whose text encoder would be imported
#: for longer than a clip takes
WITHOUT_TEXT_ENCODER = """
import torch
from skyreels.builtin import BUILTIN_FOLDER
from skyreels.conditioning.embeds import PromptEmbeds
from skyreels.weights.load import check_transformer
config = check_transformer(BUILTIN_FOLDER / "transformer").config
sizes = (1, 4, config.text_embed_dim), (1, config.pooled_projection_dim)
prompt = PromptEmbeds(*(torch.ones(size) for size in sizes))
"""


@functools.cache
def forks(*imports: str) -> "Forks":
    """The interpreter that has imported modules; it is started once and ends with the tests."""
    programs = Forks(imports[-1], forks(*imports[:-1]) if imports[1:] else None)
    atexit.register(programs.close)
    return programs


class Forks:
    """An interpreter to fork; programs run in the repository's root, one at a time.

    The root and `tests/` are where programs import from.

    Args:
        imports: module that is imported before the forks.
        origin: whose fork the interpreter is; None for a new one.
    """

    def __init__(self, imports: str, origin: "Forks | None" = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        self._process = self._orders = self._answers = None
        if not hasattr(os, "fork"):
            return
        if origin is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.forked", imports],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            self._orders, self._answers = self._process.stdin, self._process.stdout
            return
        pipes = [str(Path(self._folder.name) / name) for name in ("orders", "answers")]
        for pipe in pipes:
            os.mkfifo(pipe)
        origin.ask({"imports": imports, "pipes": pipes})
        # in the order in which the other end opens them
        self._orders, self._answers = open(pipes[0], "w"), open(pipes[1])  # noqa: SIM115

    def close(self) -> None:
        for pipe in filter(None, (self._orders, self._answers)):
            pipe.close()
        if self._process is not None:
            self._process.wait()
        self._folder.cleanup()

    def ask(self, order: dict) -> int:
        """The process that an order has begun."""
        self._orders.write(json.dumps(order) + "\n")
        self._orders.flush()
        return self.answer()

    def answer(self) -> int:
        return int(self._answers.readline())

    def start(self, command: Sequence[str], env: dict[str, str]) -> "Fork":
        """Start `["-m", module, argument...]` or `["-c", code, argument...]`."""
        interpreter = None if self._orders is None else self
        return Fork(interpreter, Path(self._folder.name), list(command), env)

    def run(self, command: Sequence[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """What `subprocess.run` with captured text returns."""
        fork = self.start(command, env)
        return subprocess.CompletedProcess(command, fork.wait(), *fork.output())


class Fork:
    """A program that runs, or has ended."""

    def __init__(
        self, parent: Forks | None, folder: Path, command: list[str], env: dict[str, str]
    ) -> None:
        self._parent, self._files = parent, [folder / "stdout", folder / "stderr"]
        if parent is None:
            out, err = (file.open("wb") for file in self._files)
            with out, err:
                self._process = subprocess.Popen(
                    [sys.executable, *command], cwd=ROOT, stdout=out, stderr=err,
                    env={**env, "PYTHONPATH": str(ROOT / "tests")},
                )  # fmt: skip
            self.pid = self._process.pid
            return
        for file in self._files:  # of the program before
            file.write_bytes(b"")
        files = [str(file) for file in self._files]
        self.pid = parent.ask({"command": command, "env": env, "files": files})

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it as a power failure would, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            self.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))

    def wait(self) -> int:
        """The exit code, or the negative number of the signal that ended it."""
        hung = threading.Timer(LIMIT_S, self.kill)
        hung.start()
        try:
            if self._parent is None:
                return self._process.wait()
            return self._parent.answer()
        finally:
            hung.cancel()

    def output(self) -> list[str]:
        """What was written to standard output and to standard error."""
        return [file.read_text() for file in self._files]


def serve(imports: str) -> None:
    """Read orders from standard input; a fork of this process becomes each of them."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    importlib.import_module(imports)
    gc.collect()
    gc.freeze()  # a program would look through all that at its end, for half a second with torch
    while line := sys.stdin.readline():
        order = json.loads(line)
        if not (pid := os.fork()):
            if "imports" in order:
                serve_pipes(**order)
            become(**order)
            return
        print(pid, flush=True)  # noqa: T201 - the answer
        if "command" in order:
            _, status = os.waitpid(pid, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201
    with contextlib.suppress(ChildProcessError):  # none is left
        while True:
            os.wait()


def serve_pipes(imports: str, pipes: list[str]) -> None:
    """Be an interpreter that has imported one module more, up to its end."""
    for number, (pipe, mode) in enumerate(zip(pipes, (os.O_RDONLY, os.O_WRONLY), strict=True)):
        os.dup2(os.open(pipe, mode), number)
    serve(imports)
    leave(0)


def become(command: list[str], env: dict[str, str], files: list[str]) -> None:
    """Be the program, up to its end."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(env)
    # also where the tests run in the background, which ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind, what, *arguments = command
    sys.argv = [kind, *arguments]
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)  # noqa: T201
            stop.code = 1
        leave(stop.code or 0)
    leave(0)  # what else is raised ends the interpreter as ever


def leave(code: int) -> None:
    """End as an interpreter does, but for taking apart every module: that is 0.3 s with torch."""
    threading._shutdown()  # waits for the threads
    for finalizer, kept in list(weakref.finalize._registry.items()):
        if kept.func.__name__ == "_del_library":  # operators in torch's tables, a tenth of a second
            finalizer.detach()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    serve(sys.argv[1])
