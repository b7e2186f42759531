"""What a run needs on this machine, before it starts: memory and time of each mode."""

from .advice import smallest, why_not
from .fallbacks import Rung, bytes_on, rungs
from .inputs import Choice, Job, Machine, machine_of, rates_needed, vae_dtype
from .modes import Preflight, cards_table, on_cards, plans, preflight, table
from .predict import (
    MAX_KEPT,
    Plan,
    activation_bytes,
    block_seconds,
    expectation,
    kind_of_work,
    plan_run,
    vae_bytes,
)
from .weights import STORED, Weights, weights_as, weights_of

__all__ = [
    "MAX_KEPT",
    "STORED",
    "Choice",
    "Job",
    "Machine",
    "Plan",
    "Preflight",
    "Rung",
    "Weights",
    "activation_bytes",
    "block_seconds",
    "bytes_on",
    "cards_table",
    "expectation",
    "kind_of_work",
    "machine_of",
    "on_cards",
    "plan_run",
    "plans",
    "preflight",
    "rates_needed",
    "rungs",
    "smallest",
    "table",
    "vae_bytes",
    "vae_dtype",
    "weights_as",
    "weights_of",
    "why_not",
]
