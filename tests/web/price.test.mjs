// What is asked for a node's price, when, and what stands on the node.
import assert from "node:assert/strict";
import { test } from "node:test";

import { badgeOf, fitText, FREE, isDue, PRICED, requestOf } from "../../web/wiro/price.mjs";

const ANSWER = { has_key: true, price: "0.30", is_exact: true, problem: "" };
const ACCOUNT = {
  limits: { per_run: "2", per_day: "20", per_month: null }, spent: { day: "1.2", month: "9" },
};
const NODE = {
  type: "WiroRemoteI2V",
  inputs: [{ name: "image", link: 7 }, { name: "steps", link: null }, { name: "prompt", link: 9 }],
  widgets: [{ name: "prompt", value: "old" }, { name: "steps", value: 30 }, { name: "x", value: {} }],
};

test("only nodes that pay are asked about", () => {
  for (const type of ["WiroTaskResult", "KSampler", "WiroUploadFile", "WiroCollect", undefined]) {
    assert.equal(requestOf({ ...NODE, type }), null);
  }
  for (const type of PRICED) assert.equal(requestOf({ ...NODE, type }).node, type);
  assert.equal(requestOf({ comfyClass: "WiroRunModel", type: "subgraph" }).node, "WiroRunModel");
});

test("linked fields, and what is no plain value, are not sent", () => {
  const asked = requestOf(NODE);
  assert.deepEqual(asked.linked, ["image", "prompt"]);
  assert.deepEqual(asked.values, { steps: 30 });
  assert.deepEqual(requestOf({ type: "WiroRunModel" }), {
    node: "WiroRunModel", values: {}, linked: [],
  });
  const odd = [undefined, null, NaN, Infinity, [], {}, () => {}, ""].map((value, i) => (
    { name: `f${i}`, value }));
  assert.deepEqual(requestOf({ type: PRICED[0], widgets: odd }).values, { f7: "" });
});

test("the line on a node", () => {
  const cases = [
    [ANSWER, ACCOUNT, "$0.30 · limit $2.00 a run · spent today $1.20 of $20.00", true],
    [{ ...ANSWER, is_exact: false }, ACCOUNT,
      "about $0.30 · limit $2.00 a run · spent today $1.20 of $20.00", true],
    [ANSWER, null, "$0.30", true],
    [{ ...ANSWER, is_each: true, is_exact: false }, null, "about $0.30 each", true],
    [{ ...ANSWER, is_most: true }, ACCOUNT, "up to $0.30 · nothing if made here · "
      + "limit $2.00 a run · spent today $1.20 of $20.00", true],
    [{ ...ANSWER, is_most: true, is_exact: false }, null,
      "up to about $0.30 · nothing if made here", true],
    [{ ...ANSWER, is_most: true, has_key: false, price: null }, null, "no API key", false],
    [{ ...ANSWER, is_free: true, price: null }, ACCOUNT, "costs nothing", false],
    [{ ...ANSWER, price: null }, null, "price not published", false],
    [{ ...ANSWER, price: null, problem: "No\nsuch  model." }, null,
      "no price: No such model.", false],
    [{ ...ANSWER, has_key: false, price: null }, ACCOUNT, "no API key", false],
    [null, ACCOUNT, "price …", false],
    [new Error("The server is away."), ACCOUNT, "no price: The server is away.", false],
    [ANSWER, { limits: { per_run: null, per_day: null }, spent: { day: "0" } },
      "$0.30 · spent today $0.00", true],
  ];
  for (const [answer, account, text, isKnown] of cases) {
    const badge = badgeOf(answer, account);
    assert.deepEqual([badge.parts.join(" · "), badge.isKnown], [text, isKnown]);
  }
  assert.ok(badgeOf(new Error("x".repeat(5000)), null).parts.join("").length < 150);
});

test("a line is never wider than its node, and the price goes last", () => {
  const parts = ["about $0.30", "limit $2.00 a run", "spent today $1.20 of $20.00"];
  const widthOf = (text) => text.length;
  assert.equal(fitText(parts, widthOf, 100), parts.join(" · "));
  assert.equal(fitText(parts, widthOf, 40), "about $0.30 · limit $2.00 a run");
  assert.equal(fitText(parts, widthOf, 12), "about $0.30");
  for (let width = 9; width < 90; width += 1) {
    const text = fitText(parts, widthOf, width);
    assert.ok(text.length <= width, `${text} in ${width}`);
    assert.ok(text.startsWith("about $"));
    assert.ok(fitText(["no price: no such model"], widthOf, width).length <= width);
  }
  assert.ok(fitText(parts, widthOf, 0).length < 12, "it comes to an end");
});

test("a field is asked about once, and not while somebody types", () => {
  const state = { seen: "", requested: "" };
  const looks = ["a", "ab", "abc", "abc", "abc", "abcd", "abc", "abc", "x", "x"];
  const asked = looks.filter((question) => isDue(state, question));
  assert.deepEqual(asked, ["abc", "x"]);
});

test("each node that may be remote says what it costs, or that it costs nothing", () => {
  const all = ["SkyReelsI2V", "WiroCollect", "WiroRemoteI2V", "WiroRunModel", "WiroSubmit", "WiroTaskResult",
    "WiroUploadFile"];
  assert.deepEqual([...PRICED, ...Object.keys(FREE)].sort(), all);
});
