// Which workflows make the page bring the picture of the templates.
import assert from "node:assert/strict";
import { test } from "node:test";

import { asksForPortrait, offer, PORTRAIT } from "../../web/portrait/find.mjs";

const NODE = { type: "LoadImage", widgets_values: [PORTRAIT, "image"] };

test("a workflow that names the picture asks for it, also inside a subgraph", () => {
  assert.equal(asksForPortrait({ nodes: [{ type: "KSampler" }, NODE] }), true);
  assert.equal(asksForPortrait({ nodes: [], definitions: { subgraphs: [{ nodes: [NODE] }] } }), true);
  const others = [
    null, {}, { nodes: null }, { nodes: [null, {}] }, { nodes: [{ ...NODE, type: "Note" }] },
    { nodes: [{ ...NODE, widgets_values: ["other.jpg"] }] },
    { nodes: [{ ...NODE, widgets_values: { image: PORTRAIT } }] },
  ];
  for (const graph of others) assert.equal(asksForPortrait(graph), false);
});

test("a name becomes a choice once, in both ways of writing an input", () => {
  for (const input of [[["a"], {}], ["COMBO", { options: ["a"] }]]) {
    assert.equal(offer(input, "b"), true);
    assert.equal(offer(input, "b"), false);
    assert.equal(offer(input, "a"), false);
  }
  for (const input of [undefined, null, [], ["COMBO"], ["COMBO", {}]]) {
    assert.equal(offer(input, "b"), true);
  }
});
