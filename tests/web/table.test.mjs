// Which rows of the panel are shown, and the file they are exported to.
import assert from "node:assert/strict";
import { test } from "node:test";

import {
  cellOf, csvName, dayOf, FILTERS, groupOf, isFiltering, matches, NO_FILTER, select, toCsv,
} from "../../web/wiro/table.mjs";

const DAY_S = 86400;
const NOON = new Date(2026, 0, 31, 12).getTime() / 1000;
const TASK = {
  id: 1, taskid: "2221", model: "wiro/SkyReels-V1", state: "ended", status: "task_postprocess_end",
  verdict: "succeeded", cost: "0.30", projected: "0.3", elapsed_s: "12.5", created_at: NOON,
  updated_at: NOON + 60, is_live: false, error: "", files: [{ filename: "0.mp4" }],
  remote_deleted: false, log: ["a line"], line: "", fraction: null,
};

/** RFC 4180, as programs for tables read it. */
function parse(text) {
  const rows = [[]];
  const cell = /(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r\n)/gy;
  while (cell.lastIndex < text.length) {
    const found = cell.exec(text);
    assert.ok(found, `cannot be read at ${text.slice(cell.lastIndex, cell.lastIndex + 40)}`);
    rows.at(-1).push(found[1] === undefined ? found[2] : found[1].replace(/""/g, '"'));
    if (found[3] === "\r\n") rows.push([]);
    if (cell.lastIndex === text.length) break;
  }
  assert.deepEqual(rows.pop(), []);
  return rows;
}

const HOSTILE = [
  "", "plain", 'a "quote"', "a,b", "a\r\nb", "a\nb", "\"", '","', "é 漢字 😀", " x ",
  "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\u00a0=1", "\ufeff=1", "＝1",
  "＋1", "－1", "＠x", "=cmd|' /C calc'!A0", '=HYPERLINK("http://x","y")', "a\0b", "\ud800x", "'=1",
];

test("hostile cells come back as they were, and none of them is a formula", () => {
  for (const text of HOSTILE) {
    const task = { ...TASK, model: text, error: text, taskid: text, files: [{ filename: text }] };
    const csv = toCsv([task, TASK]);
    assert.ok(csv.startsWith("\ufeffnumber,"), "programs that guess the encoding are told");
    const [names, row, plain] = parse(csv.slice(1));
    assert.equal(row.length, names.length);
    assert.equal(plain[names.indexOf("model")], TASK.model);
    for (const name of ["model", "error", "task", "files"]) {
      const cell = row[names.indexOf(name)];
      assert.doesNotMatch(cell, /^[\s\ufeff]*[=+\-@＝＋－＠]/, JSON.stringify(text));
      assert.doesNotMatch(cell, /^[\t\r\n]/);
      const clean = text.replace("\0", "").replace("\ud800", "\ufffd");
      assert.equal(cell.replace(/^'/, ""), clean.replace(/^'/, ""));
    }
  }
});

test("every line ends with CR LF and every cell is quoted where it must be", () => {
  assert.equal(cellOf(null), "");
  assert.equal(cellOf(undefined), "");
  assert.equal(cellOf(12), "12");
  assert.equal(cellOf('a"b'), '"a""b"');
  assert.equal(cellOf("a,b"), '"a,b"');
  assert.equal(cellOf("=a,b"), "\"'=a,b\"");
  assert.equal(cellOf("\t1"), "'\t1");
  assert.ok(toCsv([TASK]).endsWith("\r\n"));
  assert.equal(toCsv([]).split("\r\n").length, 2, "the names alone");
});

test("what is exported: money, times in UTC, no log", () => {
  const [names, row] = parse(toCsv([TASK]).slice(1));
  const told = Object.fromEntries(names.map((name, i) => [name, row[i]]));
  assert.equal(told.created, new Date(NOON * 1000).toISOString());
  assert.deepEqual([told.cost_usd, told.seconds, told.state, told.files],
    ["0.30", "12.5", "succeeded", "0.mp4"]);
  assert.doesNotMatch(toCsv([TASK]), /a line/);
  assert.equal(csvName(NOON), "wiro-tasks-2026-01-31.csv");
  assert.equal(parse(toCsv([{ ...TASK, created_at: NaN }]).slice(1))[1][1], "");
});

test("every task is in exactly one group that can be chosen", () => {
  const groups = FILTERS.map(([value]) => value).filter(Boolean);
  const states = ["intent", "sending", "started", "ended", "refused", "", "odd"];
  const verdicts = ["", "running", "succeeded", "failed", "cancelled", "no_output", "odd"];
  for (const state of states) {
    for (const verdict of verdicts) {
      for (const bits of [0, 1, 2, 3, 4, 5, 6, 7]) {
        const files = bits & 4 ? TASK.files : [];
        const flags = { is_live: Boolean(bits & 1), remote_deleted: Boolean(bits & 2), files };
        const task = { ...TASK, state, verdict, status: "", ...flags };
        const shown = groups.filter((group) => matches(task, { ...NO_FILTER, group }));
        assert.deepEqual(shown, [groupOf(task)]);
      }
    }
  }
});

test("groups say what people look for", () => {
  const cases = [
    [{ state: "started", verdict: "" }, "running"],
    [{ state: "sending", verdict: "", is_live: true }, "running"],
    [{ state: "sending", verdict: "" }, "waiting"],
    [{ verdict: "no_output" }, "waiting"],
    [{ files: [] }, "waiting"],
    [{ files: [], remote_deleted: true }, "done"],
    [{}, "done"],
    [{ verdict: "failed" }, "failed"],
    [{ state: "refused", verdict: "" }, "failed"],
    [{ verdict: "cancelled" }, "stopped"],
  ];
  for (const [changes, group] of cases) assert.equal(groupOf({ ...TASK, ...changes }), group);
});

test("a search looks for all its words in model, task and error, and for nothing else", () => {
  const task = { ...TASK, error: "Out of memory (CUDA)", log: ["hidden"] };
  for (const text of ["", "  ", "skyreels", "SKY out", "2221", "222", "memory WIRO", "(cuda)"]) {
    assert.ok(matches(task, { ...NO_FILTER, text }), text);
  }
  for (const text of ["hidden", "sky flux", "22210", ".*", "0.mp4", "memoryx"]) {
    assert.ok(!matches(task, { ...NO_FILTER, text }), text);
  }
});

test("days are those of the local calendar, both ends among them", () => {
  assert.equal(dayOf(NOON), "2026-01-31");
  assert.equal(dayOf(NaN), "");
  const at = (from, to) => matches(TASK, { ...NO_FILTER, from, to });
  assert.ok(at("2026-01-31", "2026-01-31") && at("2026-01-01", "") && at("", "2026-02-01"));
  assert.ok(!at("2026-02-01", "") && !at("", "2026-01-30") && !at("2026-02-01", "2026-01-01"));
  assert.ok(!matches({ ...TASK, created_at: NaN }, { ...NO_FILTER, from: "2026-01-01" }));
});

test("what is left stands newest first, however it came", () => {
  const tasks = [2, 5, 1, 4, 3].map((id) => ({ ...TASK, id, created_at: NOON - id * DAY_S }));
  assert.deepEqual(select(tasks, NO_FILTER).map(({ id }) => id), [5, 4, 3, 2, 1]);
  const from = dayOf(NOON - 3 * DAY_S);
  assert.deepEqual(select(tasks, { ...NO_FILTER, from }).map(({ id }) => id), [3, 2, 1]);
  assert.ok(!isFiltering(NO_FILTER) && !isFiltering({ ...NO_FILTER, text: "  " }));
  for (const change of [{ text: "a" }, { group: "done" }, { from: "x" }, { to: "x" }]) {
    assert.ok(isFiltering({ ...NO_FILTER, ...change }));
  }
});
