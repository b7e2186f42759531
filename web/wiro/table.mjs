// The rows of the panel as a table: filters and CSV export. Does not touch the page.
import { mark } from "./language.mjs";
import { describe } from "./words.mjs";

/** [value, label] of the state filter. */
export const FILTERS = [
  ["", mark("all")],
  ["running", mark("running")],
  ["waiting", mark("needs action")],
  ["done", mark("done")],
  ["failed", mark("failed")],
  ["stopped", mark("stopped")],
];

export const NO_FILTER = { text: "", group: "", from: "", to: "" };

/** The state filter that a task falls under. */
export function groupOf(task) {
  const { isActive, word } = describe(task);
  if (isActive) return "running";
  if (["outcome unknown", "ended without a file", "ended"].includes(word)) return "waiting";
  if (word === "succeeded") {
    const isHere = task.files.length > 0 || task.remote_deleted;
    return isHere ? "done" : "waiting"; // paid for, not downloaded yet
  }
  return word === "cancelled" ? "stopped" : "failed";
}

/** Whether a filter is set. */
export function isFiltering(filter) {
  return Boolean(words(filter.text).length || filter.group || filter.from || filter.to);
}

/** Whether a task matches. from, to: days as "2026-01-31", inclusive; "" for any. */
export function matches(task, { text, group, from, to }) {
  if (group && groupOf(task) !== group) return false;
  const day = dayOf(task.created_at);
  if ((from && !(day >= from)) || (to && !(day <= to))) return false;
  const line = [task.model, task.taskid, task.error].join("\n").toLowerCase();
  return words(text).every((word) => line.includes(word));
}

function words(text) {
  return text.toLowerCase().split(/\s+/).filter(Boolean);
}

/** The tasks that match a filter, newest first. */
export function select(tasks, filter) {
  return [...tasks].filter((task) => matches(task, filter)).sort((a, b) => b.id - a.id);
}

/** The local day as "2026-01-31"; "" for an invalid time. */
export function dayOf(seconds) {
  const date = new Date(seconds * 1000);
  if (Number.isNaN(date.getTime())) return "";
  const two = (number) => String(number).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
}

const COLUMNS = [
  ["number", (task) => task.id],
  ["created", (task) => timeOf(task.created_at)],
  ["updated", (task) => timeOf(task.updated_at)],
  ["model", (task) => task.model],
  ["task", (task) => task.taskid],
  ["state", (task) => describe(task).word],
  ["cost_usd", (task) => task.cost],
  ["expected_usd", (task) => task.projected],
  ["seconds", (task) => task.elapsed_s],
  ["error", (task) => task.error],
  ["files", (task) => task.files.map((file) => file.filename).join("; ")],
  ["remote_files_deleted", (task) => (task.remote_deleted ? "yes" : "no")],
];

function timeOf(seconds) {
  const date = new Date(seconds * 1000);
  return Number.isNaN(date.getTime()) ? "" : date.toISOString();
}

/**
 * Tasks as CSV (RFC 4180) for spreadsheets: UTF-8 with BOM, times in UTC.
 *
 * No cell is a formula. Logs are left out; the page has no prompts and no keys.
 */
export function toCsv(tasks) {
  const lines = [COLUMNS.map(([name]) => name)];
  for (const task of tasks) lines.push(COLUMNS.map(([, value]) => value(task)));
  return "\ufeff" + lines.map((cells) => cells.map(cellOf).join(",") + "\r\n").join("");
}

/** One cell: quoted where needed, and never a formula. */
export function cellOf(value) {
  let text = value === null || value === undefined ? "" : String(value);
  text = text.replace(/\0/g, "").replace(/[\ud800-\udfff]/gu, "\ufffd"); // unpaired surrogates
  if (/^[\s\ufeff]*[=+\-@\uff1d\uff0b\uff0d\uff20]|^[\t\r\n]/.test(text)) text = `'${text}`;
  return /[",\r\n]|^\s|\s$/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}

/** "wiro-tasks-2026-01-31.csv" */
export function csvName(nowS) {
  return `wiro-tasks-${dayOf(nowS)}.csv`;
}
