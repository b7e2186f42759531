// The line on a node that says what its last run cost: newer front ends remove the status line with
// the run's end, so the page keeps a line of its own, and the workflow file keeps its text.
import { app } from "../../../scripts/app.js";
import { findNode } from "../preview/player.mjs";
import { make, setText } from "./dom.mjs";
import { t } from "./language.mjs";
import { cachedOutcome, lineOf, outcomeOf, PROPERTY, readOutcome } from "./outcome.mjs";

const NODES = ["SkyReelsI2V", "WiroRemoteI2V", "WiroRunModel", "WiroTaskResult", "WiroSubmit",
  "WiroCollect"];
const HEIGHT = 58; // pixels: two lines, and the margins of the canvas page
const elements = new WeakMap(); // node -> element

/** An event of the server: what came of a node's run. */
export function keepOutcome(event) {
  const outcome = outcomeOf(event, Date.now());
  const node = findNode(app.rootGraph ?? app.graph, event.node);
  if (node?.comfyClass === event.class_type) keep(node, outcome); // else of another workflow
  if (outcome.mustAct) warn(outcome.text);
}

/** ComfyUI did not run these nodes, because nothing has changed. */
export function keepCached(ids) {
  for (const id of ids ?? []) {
    const node = findNode(app.rootGraph ?? app.graph, id);
    if (!NODES.includes(node?.comfyClass)) continue;
    keep(node, cachedOutcome(readOutcome(node.properties), Date.now()));
  }
}

/** Show on a node of a loaded workflow what the file keeps. */
export function restoreOutcome(node) {
  if (!NODES.includes(node.comfyClass)) return;
  const outcome = readOutcome(node.properties);
  if (outcome) show(node, outcome);
}

function keep(node, outcome) {
  node.properties ??= {};
  node.properties[PROPERTY] = outcome;
  show(node, outcome);
  // a reload of the page restores what its change tracker has seen
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
}

function show(node, outcome) {
  const element = elements.get(node) ?? addLine(node);
  const text = lineOf(outcome);
  setText(element, text);
  element.title = text;
  element.classList.toggle("skw-act", outcome.mustAct);
  app.canvas?.setDirty(true, true);
}

function addLine(node) {
  const element = make("div", "skw skw-outcome", { role: "status" });
  elements.set(node, element);
  const widget = node.addDOMWidget("outcome", "skyreels_outcome", element, {
    serialize: false, hideOnZoom: false, getValue: () => "", setValue: () => {},
    getMinHeight: () => HEIGHT, getMaxHeight: () => HEIGHT,
  });
  widget.serialize = false;
  const [, height] = node.computeSize();
  if (node.size[1] < height) node.setSize([node.size[0], height]);
  return element;
}

// no `life`: it stays until the user closes it
function warn(detail) {
  const summary = t("Wiro: you have to act");
  app.extensionManager?.toast?.add({ severity: "warn", summary, detail });
}
