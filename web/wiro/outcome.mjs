// What came of a node's run, as the node keeps it after the run. Does not touch the page.

/** Of a node's properties, which are saved with the workflow. */
export const PROPERTY = "skyreels_outcome";

const MAX_TEXT = 400; // characters
const CACHED = "not run again, nothing paid · last: ";

/** {text, mustAct, at} of the server's event. at: Unix milliseconds. */
export function outcomeOf({ line, must_act: mustAct }, at) {
  return { text: oneLine(line), mustAct: Boolean(mustAct), at };
}

/** The same for a node that ComfyUI did not run, because nothing has changed. */
export function cachedOutcome(before, at) {
  const last = before?.text.replace(CACHED, "") ?? "";
  const text = last ? CACHED + last : "not run again, nothing paid";
  return { text: oneLine(text), mustAct: before?.mustAct ?? false, at };
}

/** What a node's properties hold, or null; a workflow file may come from anyone. */
export function readOutcome(properties) {
  const kept = properties?.[PROPERTY];
  if (typeof kept?.text !== "string" || !kept.text.trim()) return null;
  const at = Number.isFinite(kept.at) ? kept.at : 0;
  return { text: oneLine(kept.text), mustAct: kept.mustAct === true, at };
}

/** The line on the node. */
export function lineOf({ text, at }, now = new Date()) {
  const date = new Date(at);
  if (!(at > 0) || Number.isNaN(date.getTime())) return text;
  const time = { hour: "2-digit", minute: "2-digit" };
  const isToday = date.toDateString() === now.toDateString();
  const when = isToday ? date.toLocaleTimeString([], time)
    : date.toLocaleString([], { day: "numeric", month: "short", ...time });
  return `${when} · ${text}`;
}

function oneLine(text) {
  return String(text).replace(/\s+/g, " ").trim().slice(0, MAX_TEXT);
}
