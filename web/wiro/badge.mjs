// The price on the nodes of the graph: drawn above the node, stored nowhere.
import { app } from "../../../scripts/app.js";
import { followAccount, loadAccount } from "./account.mjs";
import { complain } from "./dom.mjs";
import { badgeOf, fit, isDue, questionOf } from "./price.mjs";
import { post } from "./server.mjs";

const LOOK_MS = 700; // a field that has not changed between two looks is asked about
const KEEP_MS = 300000; // an answer is asked for again after that
const KEPT = 200;
const NEWS = "skyreelsPrices"; // a field of the page's reactive store, never saved
const GAP = 2; // between two rows of badges
const KNOWN = { fgColor: "#fff", bgColor: "#2b6b48" };
const UNKNOWN = { fgColor: "#bbb", bgColor: "#4a4a4a" };

const badges = new WeakMap(); // node -> {seen, asked, answer, badge}
const answers = new Map(); // question -> {answer, at}; fifty equal nodes ask once
let account = null;
let news = 0; // counts what changes badges
let isAsking = false;

/** Look at the graph from now on. */
export function showPrices() {
  followAccount((now) => {
    account = now;
    redraw();
  });
  loadAccount().catch(() => {}); // the panel tells what is wrong with the account
  setInterval(() => look().catch(complain), LOOK_MS);
}

/** A node was made: its badge is there from the beginning, for front ends that look only then. */
export function preparePrice(node) {
  if (questionOf(node) && !badges.has(node)) attach(node);
}

/** A run has ended: what is spent, and what a model did cost, is news. */
export function renewPrices() {
  answers.clear();
}

async function look() {
  if (isAsking || document.visibilityState !== "visible") return;
  isAsking = true;
  try {
    for (const node of nodesOf(app.graph)) {
      const question = questionOf(node);
      if (question) await lookAt(node, JSON.stringify(question));
    }
  } finally {
    isAsking = false;
  }
}

function* nodesOf(graph) {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    yield node;
    if (node.subgraph) yield* nodesOf(node.subgraph);
  }
}

async function lookAt(node, question) {
  const state = badges.get(node) ?? attach(node);
  const known = answers.get(question);
  if (!known || Date.now() - known.at > KEEP_MS) {
    if (state.asked === question) state.asked = ""; // it was known, and is not any more
    if (!isDue(state, question)) return;
    answers.set(question, { answer: await ask(question), at: Date.now() });
    if (answers.size > KEPT) answers.delete(answers.keys().next().value);
  } else {
    state.seen = state.asked = question;
  }
  const { answer } = answers.get(question) ?? { answer: null };
  if (state.answer === answer) return;
  state.answer = answer;
  redraw();
}

async function ask(question) {
  try {
    return await post("price", JSON.parse(question));
  } catch (error) {
    return error;
  }
}

function attach(node) {
  const state = { seen: "", asked: "", answer: null };
  badges.set(node, state);
  node.badges?.push(() => makeBadge(node, state)); // without badges the run itself tells the price
  return state;
}

/** In a row of its own above the other badges, as wide as the node at most. */
function makeBadge(node, state) {
  void app.extensionManager?.[NEWS];
  const { parts, isKnown } = badgeOf(state.answer, account);
  const made = (text) => new window.LGraphBadge({ text, ...(isKnown ? KNOWN : UNKNOWN) });
  const badge = made(parts.join(" · ")); // front ends without a canvas read its text
  badge.getWidth = () => 0;
  badge.draw = (context, x, y) => {
    const shown = made(fit(parts, (text) => made(text).getWidth(context), node.width ?? node.size[0]));
    shown.draw(context, 0, y - shown.height - GAP);
  };
  return badge;
}

// the canvas is told; nodes that are elements ("Nodes 2.0") follow what their badges have read
function redraw() {
  if (app.extensionManager) app.extensionManager[NEWS] = ++news;
  app.canvas?.setDirty(true, true);
}
