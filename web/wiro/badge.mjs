// The price badge above the nodes of the graph; stored nowhere.
import { app } from "../../../scripts/app.js";
import { loadAccount, subscribeAccount } from "./account.mjs";
import { complain } from "./dom.mjs";
import { t } from "./language.mjs";
import { badgeOf, fitText, FREE, isDue, requestOf } from "./price.mjs";
import { post } from "./server.mjs";

const CHECK_MS = 700; // a price is requested once a node is unchanged between two checks
const MAX_AGE_MS = 300000; // of an answer
const MAX_ANSWERS = 200;
const VERSION = "skyreelsPrices"; // a field of the page's reactive store, never saved
const GAP = 2; // between two rows of badges
const LETTER = 5.6; // pixels of a letter, about, where nothing measures them
const OTHERS = 120; // pixels of the other badges and the margins
const KNOWN = { fgColor: "#fff", bgColor: "#2b6b48" };
const UNKNOWN = { fgColor: "#bbb", bgColor: "#4a4a4a" };

const states = new WeakMap(); // node -> {seen, requested, answer}
const answers = new Map(); // request as JSON -> {answer, at}; equal nodes share one request
let account = null;
let version = 0; // of what the badges show
let isChecking = false;

/** Keep the badges of the graph up to date from now on. */
export function watchPrices() {
  subscribeAccount((now) => {
    account = now;
    redraw();
  });
  loadAccount().catch(() => {}); // the panel shows the account's errors
  setInterval(() => checkAll().catch(complain), CHECK_MS);
}

/** Add the badge to a new node: some front ends read badges only then. */
export function addPriceBadge(node) {
  const free = FREE[node.comfyClass];
  if (free) node.badges?.push(() => makeRow(node, [t(free)], UNKNOWN));
  else if (requestOf(node) && !states.has(node)) attach(node);
}

/** Forget all prices: a run has ended, so spending and a model's cost may have changed. */
export function refreshPrices() {
  answers.clear();
}

async function checkAll() {
  if (isChecking || document.visibilityState !== "visible") return;
  isChecking = true;
  try {
    for (const node of nodesOf(app.graph)) {
      const request = requestOf(node);
      if (request) await check(node, JSON.stringify(request));
    }
  } finally {
    isChecking = false;
  }
}

function* nodesOf(graph) {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    yield node;
    if (node.subgraph) yield* nodesOf(node.subgraph);
  }
}

async function check(node, request) {
  const state = states.get(node) ?? attach(node);
  const known = answers.get(request);
  if (!known || Date.now() - known.at > MAX_AGE_MS) {
    if (state.requested === request) state.requested = ""; // the answer has expired
    if (!isDue(state, request)) return;
    answers.set(request, { answer: await fetchPrice(request), at: Date.now() });
    if (answers.size > MAX_ANSWERS) answers.delete(answers.keys().next().value);
  } else {
    state.seen = state.requested = request;
  }
  const { answer } = answers.get(request) ?? { answer: null };
  if (state.answer === answer) return;
  state.answer = answer;
  redraw();
}

async function fetchPrice(request) {
  try {
    return await post("price", JSON.parse(request));
  } catch (error) {
    return error;
  }
}

function attach(node) {
  const state = { seen: "", requested: "", answer: null };
  states.set(node, state);
  node.badges?.push(() => makeBadge(node, state)); // without badges the run itself shows the price
  return state;
}

function makeBadge(node, state) {
  void app.extensionManager?.[VERSION];
  const { parts, isKnown } = badgeOf(state.answer, account);
  return makeRow(node, parts, isKnown ? KNOWN : UNKNOWN);
}

/** A badge in a row of its own above the others, at most as wide as the node. */
function makeRow(node, parts, colors) {
  const create = (text) => new window.LGraphBadge({ text, ...colors });
  const width = () => node.width ?? node.size[0];
  // front ends without a canvas show the text in a row with the other badges
  const badge = create(fitText(parts, (text) => LETTER * text.length, width() - OTHERS));
  badge.getWidth = () => 0;
  badge.draw = (context, x, y) => {
    const shown = create(fitText(parts, (text) => create(text).getWidth(context), width()));
    shown.draw(context, 0, y - shown.height - GAP);
  };
  return badge;
}

// the canvas redraws on request; "Nodes 2.0" elements react to the store
function redraw() {
  if (app.extensionManager) app.extensionManager[VERSION] = ++version;
  app.canvas?.setDirty(true, true);
}
