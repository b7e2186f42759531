"""The adapter to ComfyUI: the only folder that imports it, always inside functions.

So the package imports, and its nodes can be listed and tested, without ComfyUI.
"""

from .core_model import core_model
from .files import (
    check_choice,
    input_file,
    input_files,
    model_folders,
    output_folder,
    resolve,
    resume_folder,
    state_folder,
    tokenizer_folders,
    video_bytes,
    video_from_file,
    weight_files,
)
from .runtime import (
    ComfyRuntime,
    LoadedModel,
    free_host_bytes,
    register,
    status_line,
    without_inference_mode,
)
from .samplers import core_solver
from .server import (
    RemoteProgress,
    blocked,
    claim_server,
    is_interrupt,
    is_multi_user,
    linked_outputs,
    prompt_client,
    prompt_user,
    record_prompt_users,
    request_user,
    routes,
    run_at_startup,
    run_in_thread,
    running_graph,
    send_event,
)

__all__ = [
    "ComfyRuntime",
    "LoadedModel",
    "RemoteProgress",
    "blocked",
    "check_choice",
    "claim_server",
    "core_model",
    "core_solver",
    "free_host_bytes",
    "input_file",
    "input_files",
    "is_interrupt",
    "is_multi_user",
    "linked_outputs",
    "model_folders",
    "output_folder",
    "prompt_client",
    "prompt_user",
    "record_prompt_users",
    "register",
    "request_user",
    "resolve",
    "resume_folder",
    "routes",
    "run_at_startup",
    "run_in_thread",
    "running_graph",
    "send_event",
    "state_folder",
    "status_line",
    "tokenizer_folders",
    "video_bytes",
    "video_from_file",
    "weight_files",
    "without_inference_mode",
]
