// What a task's record means for people, and what can be done with it. No page in here.
import { mark, t } from "./language.mjs";

// The phases of STATUSES in wiro_api/task.py, which the server sends: word, tone, and what is shown
// until the task reports something itself. Words name states in the code and in exported files: `t`
// translates them where they are shown.
const PHASES = {
  queued: [mark("queued"), "wait", mark("waiting for its turn at the service")],
  preparing: [mark("preparing"), "run", mark("loading files and model")],
  running: [mark("running"), "run"],
  finishing: [mark("finishing"), "run", mark("writing the files")],
  ended: [mark("finishing"), "run", mark("writing the files")], // the server is fetching the result
};

const VERDICTS = {
  succeeded: { word: mark("succeeded"), tone: "good" },
  failed: { word: mark("failed"), tone: "bad" },
  cancelled: { word: mark("cancelled"), tone: "off" },
  no_output: { word: mark("ended without a file"), tone: "warn" },
};

const NEVER_SENT = mark("It was never sent to the service, so it cost nothing.");
const UNKNOWN = mark(
  "It was sent, but no answer came back: the task may be running, and may be paid for. " +
  "Look for it in the Wiro dashboard. Only if it is not there, say so here: the node may then " +
  "start another run, which is paid for as well.",
);

/** {word, tone, isActive, line, warning}: line is shown while the task says nothing itself. */
export function describe(task) {
  const ended = VERDICTS[task.verdict];
  if (task.state === "refused") return state(mark("not started"), "bad");
  if (task.state === "intent" && !task.is_live) {
    return { ...state(mark("not started"), "off"), warning: task.error ? "" : NEVER_SENT };
  }
  if (task.state === "sending" && !task.is_live) {
    return { ...state(mark("outcome unknown"), "warn"), warning: UNKNOWN };
  }
  if (task.state === "intent" || task.state === "sending") return active(mark("starting"), "wait");
  if (ended) return state(ended.word, ended.tone);
  if (task.state === "ended") return state(mark("ended"), "off");
  // a status that this version does not know is one of a running task
  return active(...PHASES[Object.hasOwn(PHASES, task.phase) ? task.phase : "running"]);
}

function state(word, tone) {
  return { word, tone, isActive: false, line: "", warning: "" };
}

function active(word, tone, line = "") {
  return { word, tone, isActive: true, line, warning: "" };
}

/** Which buttons make sense. */
export function possible(task) {
  const isKnown = Boolean(task.taskid) && ["started", "ended"].includes(task.state);
  const isOver = task.verdict in VERDICTS;
  const hasFiles = task.files.length > 0;
  const hasResult = hasFiles || !task.remote_deleted;
  const isLost = ["failed", "cancelled"].includes(task.verdict);
  return {
    // while a node of this server follows it, that node brings the files
    collect: isKnown && hasResult && !isLost && !(task.is_live && !isOver),
    download: isKnown && !hasFiles && hasResult && !isLost && (isOver || task.state === "ended"),
    stop: isKnown && task.state === "started" && !isOver,
    erase: isKnown && isOver && !task.remote_deleted,
    forget: task.state === "sending" && !task.is_live,
  };
}

/** Nobody on the server follows it, but it goes on: the page has to ask. */
export function needsAsking(task) {
  return task.state === "started" && !task.is_live;
}

export function dollars(amount) {
  if (!/^\d+(\.\d+)?$/.test(amount)) return String(amount);
  const [whole, part = ""] = String(amount).split(".");
  return `$${whole}.${part.padEnd(2, "0")}`;
}

export function costOf(task) {
  if (task.cost) return dollars(task.cost);
  return task.projected ? t("about {amount}", { amount: dollars(task.projected) }) : "";
}

/** How long it took, or has taken so far. */
export function durationOf(task, nowS) {
  if (task.elapsed_s) return duration(Number(task.elapsed_s));
  return describe(task).isActive ? duration(nowS - task.created_at) : "";
}

function duration(seconds) {
  const whole = Math.round(seconds);
  if (!(whole >= 0)) return ""; // no number, or clocks that differ
  if (whole < 60) return t("{s} s", { s: whole });
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return t("{min} min {s} s", { min: minutes, s: whole % 60 });
  return t("{h} h {min} min", { h: Math.floor(minutes / 60), min: minutes % 60 });
}

export function timeOf(seconds, now = new Date()) {
  const date = new Date(seconds * 1000);
  if (Number.isNaN(date.getTime())) return "";
  const time = { hour: "2-digit", minute: "2-digit" };
  if (date.toDateString() === now.toDateString()) return date.toLocaleTimeString([], time);
  return date.toLocaleString([], { day: "numeric", month: "short", ...time });
}

export function keyLine(account) {
  if (!account.has_key) return t("No key");
  return account.source === "environment" ? t("Key from the environment") : t("Key stored on the server");
}

const SHARED = mark(
  "All users of this server (--multi-user) share one Wiro account: key, limits and what was spent " +
  "are everybody's. Tasks are listed for the user who queued them only.",
);
const LOCKED = mark(
  "Key and limits are frozen by SKYREELS_WIRO_LOCKED in the environment of the ComfyUI server.",
);

/** What holds for the account as a whole, one sentence each. */
export function accountNotes(account) {
  const notes = [];
  if (account.is_shared) notes.push(t(SHARED));
  if (account.is_locked) notes.push(t(LOCKED));
  return notes;
}

const PER = {
  per_run: mark("{amount} a run"),
  per_day: mark("{amount} a day"),
  per_month: mark("{amount} a month"),
};

/** {text, verb}: the limits in one line, and what the button beside them says ("" for none). */
export function limitLine(account) {
  const { limits, has_default_limits: isDefault, is_locked: isLocked } = account;
  const parts = Object.keys(PER)
    .filter((name) => limits[name] !== null)
    .map((name) => t(PER[name], { amount: dollars(limits[name]) }));
  const text = parts.length ? t("Limit {amounts}", { amounts: parts.join(", ") }) : t("No spending limit");
  return { text: isDefault ? t("{text} (default)", { text }) : text, verb: isLocked ? "" : "change" };
}

/** Which parts of the account's form can be used. */
export function usable(account) {
  const isFixed = account.source === "environment"; // a stored key would have no effect
  return {
    key: !isFixed && !account.is_locked,
    remove: account.source === "file" && !account.is_locked,
    test: account.has_key,
    limits: !account.is_locked,
    // who changes a key that is there, or raises a limit, must know the key's end
    proof: account.has_key && !account.is_locked,
  };
}

export function spentLine(account) {
  const { spent, limits } = account;
  const of = (amount, limit) =>
    limit === null
      ? dollars(amount)
      : t("{amount} of {limit}", { amount: dollars(amount), limit: dollars(limit) });
  return t("Spent {day} today, {month} this month", {
    day: of(spent.day, limits.per_day), month: of(spent.month, limits.per_month),
  });
}
