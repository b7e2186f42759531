// Add a task's result node to the graph.
import { app } from "../../../scripts/app.js";
import { mark, t } from "./language.mjs";

const NODE = "WiroTaskResult";
const STEP = 24; // offset of nodes that are added one after another

let added = 0;

/** Add a Wiro Task Result node for a task in the middle of the visible canvas and select it. */
export function addResultNode(taskid, panel) {
  const node = window.LiteGraph.createNode(NODE);
  if (!node) {
    const text = mark("The node {name} is not registered: check that the package was loaded.");
    throw new Error(t(text, { name: NODE }));
  }
  const widget = node.widgets?.find((candidate) => candidate.name === "task");
  if (!widget) throw new Error(t("The node {name} has no field \"task\".", { name: NODE }));
  const graph = app.canvas.graph ?? app.graph; // the open subgraph, if any
  node.pos = place(node, panel);
  graph.beforeChange?.();
  graph.add(node);
  widget.value = taskid;
  widget.callback?.(taskid);
  graph.afterChange?.();
  app.canvas.selectNode(node);
  app.canvas.setDirty(true, true);
}

function place(node, panel) {
  const { scale, offset } = app.canvas.ds;
  const visible = app.canvas.canvas.getBoundingClientRect();
  let { left, right } = visible;
  const cover = panel.getBoundingClientRect(); // the sidebar lies over the canvas
  if (cover.left < visible.left + visible.width / 2) left = Math.max(left, cover.right);
  else right = Math.min(right, cover.left);
  const shift = (added++ % 8) * STEP;
  const x = ((left + right) / 2 - visible.left) / scale - offset[0] - node.size[0] / 2;
  const y = visible.height / 2 / scale - offset[1] - node.size[1] / 2;
  return [x + shift, y + shift];
}
