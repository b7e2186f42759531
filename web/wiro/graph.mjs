// The way from a task to the graph.
import { app } from "../../../scripts/app.js";

const NODE = "WiroTaskResult";
const STEP = 24; // nodes added one after another do not hide each other

let added = 0;

/** Add the node that collects a task's files, selected, in the middle of what is seen. */
export function addResultNode(taskid, panel) {
  const node = window.LiteGraph.createNode(NODE);
  if (!node) throw new Error(`The node ${NODE} is not there: was the package loaded?`);
  const widget = node.widgets?.find((candidate) => candidate.name === "task");
  if (!widget) throw new Error(`The node ${NODE} has no field "task".`);
  const graph = app.canvas.graph ?? app.graph; // the subgraph that is open, if one is
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
  const seen = app.canvas.canvas.getBoundingClientRect();
  let { left, right } = seen;
  const cover = panel.getBoundingClientRect(); // the sidebar lies over the canvas
  if (cover.left < seen.left + seen.width / 2) left = Math.max(left, cover.right);
  else right = Math.min(right, cover.left);
  const shift = (added++ % 8) * STEP;
  const x = ((left + right) / 2 - seen.left) / scale - offset[0] - node.size[0] / 2;
  const y = seen.height / 2 / scale - offset[1] - node.size[1] / 2;
  return [x + shift, y + shift];
}
