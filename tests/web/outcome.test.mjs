// What a node keeps of its run, and what a workflow file may say of it.
import assert from "node:assert/strict";
import { test } from "node:test";

import { loadLanguage } from "../../web/wiro/language.mjs";
import { cachedOutcome, lineOf, outcomeOf, PROPERTY, readOutcome } from "../../web/wiro/outcome.mjs";

const NOW = new Date(2026, 10, 27, 18, 30);
const AT = NOW.getTime() - 60000;
const PAID = outcomeOf({ line: "done · charged\n $0.12 · task 7", must_act: false }, AT);

test("a node keeps what the server says, in one line, and reads it back from its file", () => {
  assert.deepEqual(PAID, { text: "done · charged $0.12 · task 7", mustAct: false, at: AT });
  const saved = JSON.parse(JSON.stringify({ [PROPERTY]: PAID }));
  assert.deepEqual(readOutcome(saved), PAID);
  assert.match(lineOf(PAID, NOW), /29.*· done · charged \$0\.12 · task 7$/);
  assert.equal(outcomeOf({ line: "x".repeat(5000), must_act: 1 }, AT).text.length, 400);
});

test("a run that ComfyUI spares itself costs nothing, and what the last one cost stays", () => {
  const once = cachedOutcome(PAID, NOW.getTime());
  assert.equal(once.text, `not run again, nothing paid · last: ${PAID.text}`);
  assert.equal(cachedOutcome(once, NOW.getTime()).text, once.text);
  const nothing = cachedOutcome(null, 1);
  assert.equal(nothing.text, "not run again, nothing paid");
  assert.equal(cachedOutcome(nothing, 1).text, nothing.text);
  assert.equal(cachedOutcome({ ...PAID, mustAct: true }, 1).mustAct, true);
});

test("a run that was spared is told in the page's language, and kept in English", async (context) => {
  context.after(() => loadLanguage(""));
  const [english, once] = [cachedOutcome(null, 0), cachedOutcome(PAID, 0)];
  await loadLanguage("zh");
  assert.deepEqual([cachedOutcome(null, 0), cachedOutcome(PAID, 0)], [english, once]);
  assert.deepEqual(cachedOutcome(once, 0), once);
  assert.equal(lineOf(english), "未重新运行，没有费用");
  assert.equal(lineOf(once), `未重新运行，没有费用 · 上次：${PAID.text}`);
  assert.equal(lineOf({ ...PAID, at: 0 }), PAID.text);
});

test("a file from anyone breaks nothing", () => {
  const odd = [undefined, null, {}, 7, "x", { text: 7 }, { text: " " }, { text: ["x"] }, []];
  for (const kept of odd) assert.equal(readOutcome({ [PROPERTY]: kept }), null);
  assert.equal(readOutcome(undefined), null);
  const read = readOutcome({ [PROPERTY]: { text: "<b>x</b>\n", at: "soon", mustAct: "yes" } });
  assert.deepEqual(read, { text: "<b>x</b>", mustAct: false, at: 0 });
  for (const at of [0, -1, NaN, 1e300]) assert.equal(lineOf({ text: "x", at }, NOW), "x");
});
