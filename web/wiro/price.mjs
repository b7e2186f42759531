// The price of a node before it is queued. Does not touch the page.
import { mark, t } from "./language.mjs";
import { dollars } from "./words.mjs";

/** Nodes that start a paid run, SkyReels I2V only as its widgets say. */
export const PRICED = ["SkyReelsI2V", "WiroRemoteI2V", "WiroRunModel", "WiroSubmit"];

const NOTHING = mark("costs nothing");

/** What stands on the other nodes, for `t`. */
export const FREE = {
  WiroTaskResult: NOTHING,
  WiroUploadFile: NOTHING,
  WiroCollect: mark("price: see Wiro Submit"),
};

const MAX_REASON = 120; // characters

/**
 * The body of a price request for a node, or null if the node never costs anything.
 *
 * Only what a price depends on: names and plain values of its widgets, names of its links.
 */
export function requestOf(node) {
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
 * {parts, isKnown}: the badge's texts, the most important first.
 *
 * answer: of the server, an Error, or null while waiting. account: of the page, or null.
 */
export function badgeOf(answer, account) {
  if (answer === null) return unknown(t("price …"));
  if (answer instanceof Error) return unknown(t("no price: {reason}", { reason: lineOf(answer.message) }));
  if (answer.is_free) return unknown(t(NOTHING));
  if (!answer.has_key) return unknown(t("no API key"));
  if (answer.problem) return unknown(t("no price: {reason}", { reason: lineOf(answer.problem) }));
  const money = account ? moneyOf(account) : [];
  if (answer.price === null) return unknown(t("price not published"), ...money);
  const exact = dollars(answer.price);
  const amount = answer.is_exact ? exact : t("about {amount}", { amount: exact });
  if (answer.is_most) {
    return { parts: [t("up to {amount}", { amount }), t("nothing if made here"), ...money], isKnown: true };
  }
  const price = answer.is_each ? t("{amount} each", { amount }) : amount;
  return { parts: [price, ...money], isKnown: true };
}

function unknown(...parts) {
  return { parts, isKnown: false };
}

function lineOf(text) {
  return text.replace(/\s+/g, " ").trim().slice(0, MAX_REASON);
}

function moneyOf({ limits, spent }) {
  const parts = [];
  if (limits.per_run !== null) parts.push(t("limit {amount} a run", { amount: dollars(limits.per_run) }));
  const amount = dollars(spent.day);
  if (limits.per_day === null) return [...parts, t("spent today {amount}", { amount })];
  return [...parts, t("spent today {amount} of {limit}", { amount, limit: dollars(limits.per_day) })];
}

/** The parts that fit a width: the last ones are dropped first, then characters. */
export function fitText(parts, widthOf, width) {
  for (let count = parts.length; count > 0; count -= 1) {
    const text = parts.slice(0, count).join(" · ");
    if (widthOf(text) <= width) return text;
  }
  let text = parts[0];
  while (text.length > 8 && widthOf(`${text}…`) > width) text = text.slice(0, -1).trimEnd();
  return `${text}…`;
}

/**
 * Whether to send a request now: once it is unchanged since the last check, so not while typing.
 *
 * state: {seen, requested}: the last requests as JSON; updated here.
 */
export function isDue(state, request) {
  const isSettled = state.seen === request;
  state.seen = request;
  if (!isSettled || state.requested === request) return false;
  state.requested = request;
  return true;
}
