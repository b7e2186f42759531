// What a node will cost, said on it before it is queued. No page in here.
import { dollars } from "./words.mjs";

/** Nodes that pay for a run when they are queued. */
export const PRICED = ["WiroRemoteI2V", "WiroRunModel", "WiroSubmit"];

const WAITING = { text: "price …", isKnown: false };
const LONGEST = 90; // letters of a reason on a node

/**
 * What the server is asked for a node, or null if the node pays for nothing.
 *
 * Only what a price can be made of: names and plain values of its fields, names of its links.
 */
export function questionOf(node) {
  const type = node.comfyClass ?? node.type;
  if (!PRICED.includes(type)) return null;
  const linked = (node.inputs ?? []).filter((input) => input.link != null).map(({ name }) => name);
  const values = {};
  for (const { name, value } of node.widgets ?? []) {
    if (name && isPlain(value) && !linked.includes(name)) values[name] = value;
  }
  return { node: type, values, linked };
}

function isPlain(value) {
  return typeof value === "string" || typeof value === "boolean" || Number.isFinite(value);
}

/**
 * {text, isKnown}: what stands on the node.
 *
 * answer: of the server, an Error, or null while it is waited for. account: of the page, or null.
 */
export function badgeOf(answer, account) {
  if (answer === null) return WAITING;
  if (answer instanceof Error) return unknown(answer.message);
  if (!answer.has_key) return { text: "no key", isKnown: false };
  const told = answer.price === null ? reasonOf(answer) : "";
  const price = `${answer.is_exact ? "" : "about "}${dollars(answer.price ?? "")}`;
  const parts = [told || price, ...(account ? moneyOf(account) : [])];
  return { text: parts.join(" · "), isKnown: !told };
}

function reasonOf({ problem }) {
  return problem ? unknown(problem).text : "price not told";
}

function unknown(reason) {
  const line = reason.replace(/\s+/g, " ").trim();
  const end = line.length > LONGEST ? `${line.slice(0, LONGEST - 1)}…` : line;
  return { text: `price not told: ${end}`, isKnown: false };
}

function moneyOf({ limits, spent }) {
  const parts = [];
  if (limits.per_run !== null) parts.push(`limit ${dollars(limits.per_run)} a run`);
  const of = limits.per_day === null ? "" : ` of ${dollars(limits.per_day)}`;
  return [...parts, `spent today ${dollars(spent.day)}${of}`];
}

/**
 * Whether to ask now, from what was seen at the last look: not while somebody types.
 *
 * state: {seen, asked}: the questions as texts; it is brought up to date.
 */
export function isDue(state, question) {
  const isSettled = state.seen === question;
  state.seen = question;
  if (!isSettled || state.asked === question) return false;
  state.asked = question;
  return true;
}
