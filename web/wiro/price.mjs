// What a node will cost, said on it before it is queued. No page in here.
import { dollars } from "./words.mjs";

/** Nodes that pay for a run when they are queued. */
export const PRICED = ["WiroRemoteI2V", "WiroRunModel", "WiroSubmit"];

const LONGEST = 120; // letters of a reason

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
 * {parts, isKnown}: what stands on the node, the most important first.
 *
 * answer: of the server, an Error, or null while it is waited for. account: of the page, or null.
 */
export function badgeOf(answer, account) {
  if (answer === null) return unknown("price …");
  if (answer instanceof Error) return unknown(`price not told: ${lineOf(answer.message)}`);
  if (!answer.has_key) return unknown("no key");
  if (answer.problem) return unknown(`price not told: ${lineOf(answer.problem)}`);
  const money = account ? moneyOf(account) : [];
  if (answer.price === null) return unknown("price not told", ...money);
  const price = `${answer.is_exact ? "" : "about "}${dollars(answer.price)}${answer.is_each ? " each" : ""}`;
  return { parts: [price, ...money], isKnown: true };
}

function unknown(...parts) {
  return { parts, isKnown: false };
}

function lineOf(text) {
  return text.replace(/\s+/g, " ").trim().slice(0, LONGEST);
}

function moneyOf({ limits, spent }) {
  const parts = [];
  if (limits.per_run !== null) parts.push(`limit ${dollars(limits.per_run)} a run`);
  const of = limits.per_day === null ? "" : ` of ${dollars(limits.per_day)}`;
  return [...parts, `spent today ${dollars(spent.day)}${of}`];
}

/** As much of the parts as fits: whole ones from the end are left out, then letters. */
export function fit(parts, widthOf, width) {
  for (let count = parts.length; count > 0; count -= 1) {
    const text = parts.slice(0, count).join(" · ");
    if (widthOf(text) <= width) return text;
  }
  let text = parts[0];
  while (text.length > 8 && widthOf(`${text}…`) > width) text = text.slice(0, -1).trimEnd();
  return `${text}…`;
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
