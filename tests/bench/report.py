"""The section for tests/bench/LOG.md of a run of tests/scripts/gpu_check.py.

    python tests/bench/report.py results.jsonl [--date YYYY-MM-DD]

Prints Markdown: the machine, the bars, one table a step (what belongs to one subject on one line,
so that quality stands beside speed; forward passes also as times diffusers and as share of the
matrix product's rate), what was not measured and why, and the problems.
"""

import argparse
import datetime
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from gpu_check import bars, figures, judge, read, shown

#: steps that time forward passes of the same model
FORWARD_STEPS = ("exact", "fp8", "int8")
#: keys of a record that are not details of its figure
OWN_KEYS = ("step", "name", "value", "unit")


def machine(records: Sequence[dict]) -> str:
    """A paragraph: what it ran on, with which versions."""
    found = {name: value for (step, name), value in figures(records).items()
             if step == "environment"}  # fmt: skip
    run = next((r["run"] for r in records if "run" in r), {})
    packages = ("python", "torch", "libcudnn", "triton", "diffusers", "transformers", "numpy",
                "comfy_kitchen", "cudnn")  # fmt: skip
    versions = [
        f"{name} {found[name + ': version']}" for name in packages if name + ": version" in found
    ]
    state = [
        f"{name} {found[when + ': ' + name]} ({when})"
        for when, names in (("at rest", ("driver", "power limit")),
                            ("at work", ("SM clock", "memory clock", "power", "temperature")))
        for name in names
        if f"{when}: {name}" in found
    ]  # fmt: skip
    text = f"One {found.get('device: name', 'unknown device')}, {', '.join([*state, *versions])}; "
    text += f"`python tests/scripts/gpu_check.py`, {run.get('size', '?')} size, random weights."
    if "GEMM: rate" in found:
        text += f" A bf16 matrix product ran at {shown(found['GEMM: rate'])} TFLOP/s in that run."
    return text


def row(cells: Sequence[object]) -> str:
    """A line of a table."""
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table, and an empty line after it."""
    return [row(head), row(["---"] * len(head)), *map(row, rows), ""] if rows else []


def compared(step: str, record: dict, found: dict[tuple[str, str], Any]) -> list[str]:
    """For the time of a forward pass: times diffusers, and share of the matrix product's rate."""
    if step not in FORWARD_STEPS or not record["name"].endswith(": time"):
        return []
    texts = []
    theirs, seconds = found.get(("exact", "diffusers: time")), record["value"]
    if theirs and seconds:
        texts.append(f"{theirs / seconds:.3f} times diffusers")
    work, rate = found.get(("exact", "forward: work")), found.get(("environment", "GEMM: rate"))
    if work and rate and seconds and step == "exact":
        texts.append(f"{work / seconds / rate:.3f} of the matrix product's rate")
    return texts


def told(value: object) -> str:
    """A detail in brief."""
    if isinstance(value, list):
        return " ".join(told(each) for each in value)
    if isinstance(value, dict):
        return "; ".join(f"{key} {told(each)}" for key, each in value.items())
    return shown(value)


def alike(subjects: dict[str, dict[str, dict]], uses: Counter[str]) -> list[list[str]]:
    """Subjects in groups that have columns in common."""
    groups: list[tuple[set[str], list[str]]] = []
    for subject, quantities in subjects.items():
        columns = {column for column in quantities if uses[column] > 1}
        joined = [group for group in groups if group[0] & columns]
        for group in joined:
            groups.remove(group)
            columns |= group[0]
        groups.append((columns, [*(s for group in joined for s in group[1]), subject]))
    return [group[1] for group in groups]


def step_section(step: str, records: Sequence[dict]) -> list[str]:
    """Heading, tables and what was skipped of one step."""
    found = figures(records)
    own = [r for r in records if r.get("step") == step]
    ended = next((r for r in own if "ended" in r), {"ended": "did not end", "seconds": "?"})
    lines = [f"### {step} ({ended['ended']}, {ended['seconds']} s)", ""]
    subjects: dict[str, dict[str, dict]] = {}
    for record in own:
        if "value" in record:
            subject, _, quantity = record["name"].rpartition(": ")
            unit = record.get("unit", "")
            column = f"{quantity}, {unit}" if unit else quantity
            subjects.setdefault(subject, {})[column] = record
    uses = Counter(column for columns in subjects.values() for column in columns)
    single: list[list[str]] = []
    for group in alike(subjects, uses):
        # a column for what several subjects have, a line for everything else
        columns = list(dict.fromkeys(c for s in group for c in subjects[s] if uses[c] > 1))
        rows = []
        for subject in group:
            cells, more = [""] * len(columns), []
            for column, record in subjects[subject].items():
                details = [f"{key} {told(v)}" for key, v in record.items() if key not in OWN_KEYS]
                details = [*compared(step, record, found), *details]
                if column in columns:
                    cells[columns.index(column)] = shown(record["value"])
                    more += details
                else:
                    value = f"{shown(record['value'])} {record.get('unit', '')}".rstrip()
                    single.append([record["name"], value, ", ".join(details)])
            if any(cells):
                rows.append([subject, *cells, ", ".join(more)])
        lines += table(["", *columns, "more"], rows)
    lines += table(["figure", "value", "more"], single)
    skipped = [f"{r['name']} ({r['skipped']})" for r in own if "skipped" in r]
    if skipped:
        lines += [f"Not measured: {'; '.join(skipped)}.", ""]
    return lines


def report(records: Sequence[dict], date: str) -> str:
    """The whole section."""
    run = next((r["run"] for r in records if "run" in r), {"steps": []})
    lines = [f"## {date} — the GPU check", "", machine(records), ""]
    lines += table(
        ["bar", "value"],
        [[name, "not measured" if value is None else value]
         for name, value in bars(records).items()],
    )  # fmt: skip
    for step in run["steps"]:
        lines += step_section(step, records)
    problems = judge(records)
    lines += ["Problems:", "", *(f"* {problem}" for problem in problems or ["none"])]
    return "\n".join(lines)


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    options = parser.parse_args()
    print(report(read(options.results), options.date))


if __name__ == "__main__":
    main()
