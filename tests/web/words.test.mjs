// A task's states, the buttons that show, and what is said of account and limits.
import assert from "node:assert/strict";
import { test } from "node:test";

import {
  accountNotes, costOf, describe, dollars, durationOf, keyLine, limitLine, needsAsking, possible,
  spentLine, timeOf, usable,
} from "../../web/wiro/words.mjs";

const TASK = {
  id: 1, taskid: "2221", model: "wiro/SkyReels-V1", state: "started", status: "task_queue",
  phase: "queued",
  verdict: "", cost: "", projected: "", elapsed_s: "", created_at: 1000, is_live: false, error: "",
  files: [], remote_deleted: false,
};
const FILE = { filename: "0.mp4" };
const ACCOUNT = {
  has_key: true, source: "file", is_locked: false, is_shared: false, has_default_limits: false,
  limits: { per_run: null, per_day: null, per_month: null }, spent: { day: "0", month: "0" },
};

/** Every task the server can tell of, whether it makes sense or not. */
function* everyTask() {
  for (const state of ["intent", "sending", "started", "ended", "refused", "", "new word"]) {
    for (const verdict of ["", "running", "succeeded", "failed", "cancelled", "no_output", "odd"]) {
      for (const phase of ["", "queued", "running", "finishing", "ended", "odd"]) {
        for (let bits = 0; bits < 16; bits += 1) {
          const [is_live, remote_deleted] = [Boolean(bits & 1), Boolean(bits & 2)];
          const [taskid, files] = [bits & 4 ? "2221" : "", bits & 8 ? [FILE] : []];
          yield { ...TASK, state, verdict, phase, is_live, remote_deleted, taskid, files };
        }
      }
    }
  }
}

test("a task's state has one word and a tone", () => {
  const cases = [
    [{ state: "refused" }, "not started", "bad", false],
    [{ state: "intent", taskid: "" }, "not started", "off", false],
    [{ state: "intent", taskid: "", is_live: true }, "starting", "wait", true],
    [{ state: "sending", taskid: "" }, "outcome unknown", "warn", false],
    [{ state: "sending", taskid: "", is_live: true }, "starting", "wait", true],
    [{ phase: "queued" }, "queued", "wait", true],
    [{ phase: "preparing" }, "preparing", "run", true],
    [{ phase: "running" }, "running", "run", true],
    [{ phase: "a word of tomorrow" }, "running", "run", true],
    [{ phase: "constructor" }, "running", "run", true],
    [{ phase: undefined }, "running", "run", true],
    [{ phase: "finishing" }, "finishing", "run", true],
    [{ phase: "ended" }, "finishing", "run", true],
    [{ state: "ended", verdict: "succeeded" }, "succeeded", "good", false],
    [{ state: "ended", verdict: "failed" }, "failed", "bad", false],
    [{ state: "ended", verdict: "cancelled" }, "cancelled", "off", false],
    [{ state: "ended", verdict: "no_output" }, "ended without a file", "warn", false],
    [{ state: "ended", verdict: "" }, "ended", "off", false],
  ];
  for (const [changes, word, tone, isActive] of cases) {
    const state = describe({ ...TASK, ...changes });
    assert.deepEqual([state.word, state.tone, state.isActive], [word, tone, isActive], word);
  }
});

test("an unknown outcome is explained, and a run that was never sent as well", () => {
  assert.match(describe({ ...TASK, state: "sending" }).warning, /may be paid for/);
  assert.match(describe({ ...TASK, state: "intent" }).warning, /cost nothing/);
  assert.equal(describe({ ...TASK, state: "intent", error: "why" }).warning, "");
});

test("buttons of each state", () => {
  const shown = (changes) =>
    Object.entries(possible({ ...TASK, ...changes })).filter(([, is]) => is).map(([name]) => name);
  const over = { state: "ended", verdict: "succeeded" };
  assert.deepEqual(shown({ state: "intent", taskid: "" }), []);
  assert.deepEqual(shown({ state: "refused", taskid: "" }), []);
  assert.deepEqual(shown({ state: "sending", taskid: "" }), ["forget"]);
  assert.deepEqual(shown({ state: "sending", taskid: "", is_live: true }), []);
  assert.deepEqual(shown({}), ["collect", "stop"]);
  assert.deepEqual(shown({ is_live: true }), ["stop"]);
  assert.deepEqual(shown(over), ["collect", "download", "erase"]);
  assert.deepEqual(shown({ ...over, files: [FILE] }), ["collect", "erase"]);
  assert.deepEqual(shown({ ...over, files: [FILE], remote_deleted: true }), ["collect"]);
  assert.deepEqual(shown({ ...over, remote_deleted: true }), []);
  assert.deepEqual(shown({ state: "ended", verdict: "failed" }), ["erase"]);
  assert.deepEqual(shown({ state: "ended", verdict: "cancelled" }), ["erase"]);
  assert.deepEqual(shown({ state: "ended", verdict: "" }), ["collect", "download"]);
});

test("whatever the server tells, no button is offered that cannot work", () => {
  let count = 0;
  for (const task of everyTask()) {
    const can = possible(task);
    const state = describe(task);
    const what = JSON.stringify(task);
    count += 1;
    assert.equal(typeof state.word, "string", what);
    assert.notEqual(state.word, "", what);
    if (!task.taskid) {
      assert.ok(!(can.collect || can.download || can.stop || can.erase), what);
    }
    if (can.stop) assert.ok(state.isActive, what);
    if (can.forget) assert.ok(task.state === "sending" && !task.is_live, what);
    if (can.erase) assert.ok(!state.isActive && !task.remote_deleted, what);
    if (can.download) assert.ok(!task.files.length && !task.remote_deleted, what);
    if (needsAsking(task)) assert.ok(!task.is_live && task.state === "started", what);
  }
  assert.ok(count > 4000);
});

test("money is told as it is", () => {
  assert.equal(dollars("0.3"), "$0.30");
  assert.equal(dollars("2"), "$2.00");
  assert.equal(dollars("0.00351"), "$0.00351");
  assert.equal(dollars("free"), "free");
  assert.equal(costOf({ ...TASK, cost: "0.3", projected: "9" }), "$0.30");
  assert.equal(costOf({ ...TASK, projected: "0.3" }), "about $0.30");
  assert.equal(costOf(TASK), "");
});

test("durations and times survive odd numbers", () => {
  assert.equal(durationOf({ ...TASK, elapsed_s: "59.6" }, 0), "1 min 0 s");
  assert.equal(durationOf({ ...TASK, elapsed_s: "x" }, 0), "");
  assert.equal(durationOf(TASK, 1042), "42 s");
  assert.equal(durationOf(TASK, 900), "", "clocks that differ");
  assert.equal(durationOf({ ...TASK, state: "ended" }, 2000), "");
  assert.equal(durationOf({ ...TASK, elapsed_s: "7261" }, 0), "2 h 1 min");
  for (const odd of [NaN, Infinity, 1e300, undefined]) assert.equal(timeOf(odd), "");
});

test("nothing of the key is told, only where it is from", () => {
  assert.equal(keyLine(ACCOUNT), "Key stored on the server");
  assert.equal(keyLine({ ...ACCOUNT, source: "environment" }), "Key from the environment");
  assert.equal(keyLine({ ...ACCOUNT, has_key: false }), "No key");
});

test("limits in a line, the default called so, and a button unless they are frozen", () => {
  const limits = { per_run: "2", per_day: null, per_month: "20" };
  assert.deepEqual(limitLine({ ...ACCOUNT, limits }), {
    text: "Limit $2.00 a run, $20.00 a month", verb: "change",
  });
  const first = { ...ACCOUNT, limits: { ...limits, per_month: null }, has_default_limits: true };
  assert.deepEqual(limitLine(first), { text: "Limit $2.00 a run (default)", verb: "change" });
  assert.deepEqual(limitLine({ ...ACCOUNT, is_locked: true }), {
    text: "No spending limit", verb: "",
  });
});

test("what was spent stands beside its limit", () => {
  const account = { ...ACCOUNT, spent: { day: "0.3", month: "1" } };
  assert.equal(spentLine(account), "Spent $0.30 today, $1.00 this month");
  account.limits = { per_run: null, per_day: "2", per_month: "20" };
  assert.equal(spentLine(account), "Spent $0.30 of $2.00 today, $1.00 of $20.00 this month");
});

test("what cannot be changed is not offered", () => {
  assert.deepEqual(usable(ACCOUNT), {
    key: true, remove: true, test: true, limits: true, proof: true,
  });
  assert.deepEqual(usable({ ...ACCOUNT, source: "environment" }), {
    key: false, remove: false, test: true, limits: true, proof: true,
  });
  assert.deepEqual(usable({ ...ACCOUNT, source: "none", has_key: false }), {
    key: true, remove: false, test: false, limits: true, proof: false,
  });
  assert.deepEqual(usable({ ...ACCOUNT, is_locked: true }), {
    key: false, remove: false, test: true, limits: false, proof: false,
  });
});

test("one account of many users and a frozen one are said plainly", () => {
  assert.deepEqual(accountNotes(ACCOUNT), []);
  assert.match(accountNotes({ ...ACCOUNT, is_shared: true })[0], /share one Wiro account/);
  assert.match(accountNotes({ ...ACCOUNT, is_locked: true })[0], /SKYREELS_WIRO_LOCKED/);
});
