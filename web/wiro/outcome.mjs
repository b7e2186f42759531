// What came of a node's run, as the node keeps it after the run. Does not touch the page.
import { mark, t } from "./language.mjs";

/** Of a node's properties, which are saved with the workflow. */
export const PROPERTY = "skyreels_outcome";

const MAX_TEXT = 400; // characters
// English in the workflow file, which any page may open; `lineOf` translates them
const CACHED = mark("not run again, nothing paid");
const CACHED_LAST = mark("not run again, nothing paid · last: {outcome}");
const BEFORE_LAST = CACHED_LAST.replace("{outcome}", "");

/** {text, mustAct, at} of the server's event. at: Unix milliseconds. */
export function outcomeOf({ line, must_act: mustAct }, at) {
  return { text: oneLine(line), mustAct: Boolean(mustAct), at };
}

/** The same for a node that ComfyUI did not run, because nothing has changed. */
export function cachedOutcome(before, at) {
  const last = before && before.text !== CACHED ? before.text.replace(BEFORE_LAST, "") : "";
  const text = last ? BEFORE_LAST + last : CACHED;
  return { text: oneLine(text), mustAct: before?.mustAct ?? false, at };
}

/** What a node's properties hold, or null; a workflow file may come from anyone. */
export function readOutcome(properties) {
  const kept = properties?.[PROPERTY];
  if (typeof kept?.text !== "string" || !kept.text.trim()) return null;
  const at = Number.isFinite(kept.at) ? kept.at : 0;
  return { text: oneLine(kept.text), mustAct: kept.mustAct === true, at };
}

/** The line on the node, in the page's language but for what the server said. */
export function lineOf({ text: kept, at }, now = new Date()) {
  const text = translated(kept);
  const date = new Date(at);
  if (!(at > 0) || Number.isNaN(date.getTime())) return text;
  const time = { hour: "2-digit", minute: "2-digit" };
  const isToday = date.toDateString() === now.toDateString();
  const when = isToday ? date.toLocaleTimeString([], time)
    : date.toLocaleString([], { day: "numeric", month: "short", ...time });
  return `${when} · ${text}`;
}

function translated(text) {
  if (text === CACHED) return t(CACHED);
  const isCached = text.startsWith(BEFORE_LAST);
  return isCached ? t(CACHED_LAST, { outcome: text.slice(BEFORE_LAST.length) }) : text;
}

function oneLine(text) {
  return String(text).replace(/\s+/g, " ").trim().slice(0, MAX_TEXT);
}
