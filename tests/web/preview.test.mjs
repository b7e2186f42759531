// Which picture of a moving preview is shown when, and that nothing stays behind.
import assert from "node:assert/strict";
import { test } from "node:test";

import { cornerOf, createPlayer, findNode, layersOf, picturesOf, sizeOf } from "../../web/preview/player.mjs";

const settled = () => new Promise((resolve) => setImmediate(resolve));

/** A player on a page of stand-ins; time moves only by `run`. */
function page() {
  const made = {
    now: 0, timers: new Map(), shown: [], open: 0, drawn: 0, complaints: [], nodes: new Set(["12", "7:3"]),
    failing: "", opening: null, drawing: null,
  };
  let last = 0;
  made.player = createPlayer({
    open: async (clip) => {
      if (made.failing === "open") throw new Error("no picture");
      if (made.opening) await made.opening;
      made.open += 1;
      return { width: 8, height: 8, clip, close: () => (made.open -= 1) };
    },
    draw: async (sheet, clip, picture) => {
      if (made.failing === "draw") throw new Error("no canvas");
      if (made.drawing) await made.drawing;
      made.drawn += 1;
      return `${clip.name} ${picture}`;
    },
    show: ({ node }, picture) => made.shown.push(`${node}: ${picture}`),
    isThere: ({ node }) => made.nodes.has(node),
    complain: (error) => made.complaints.push(error.message),
    clock: {
      now: () => made.now,
      setInterval: (work, ms) => {
        made.timers.set((last += 1), { work, ms });
        return last;
      },
      clearInterval: (timer) => made.timers.delete(timer),
    },
  });
  made.run = async (ms) => {
    for (const end = made.now + ms; ; ) {
      const [timer] = made.timers.values();
      if (!timer || made.now + timer.ms > end) break;
      made.now += timer.ms + 0.01; // timers are never early
      timer.work();
      await settled();
    }
  };
  return made;
}

const clipOf = (name, changes = {}) => ({ node: "12", name, count: 3, fps: 6, ...changes });
const pictures = ({ shown }) => shown.map((line) => line.split(" ").at(-1)).join(" ");

// --- what a picture is --------------------------------------------------------------------------

test("between two frames there is one that is faded from both", () => {
  assert.equal(picturesOf(25), 49);
  const all = [...Array(picturesOf(3)).keys()].map(layersOf);
  assert.deepEqual(all, [[[0, 1]], [[0, 1], [1, 0.5]], [[1, 1]], [[1, 1], [2, 0.5]], [[2, 1]]]);
});

test("a single frame is one picture", () => {
  assert.equal(picturesOf(1), 1);
  assert.deepEqual(layersOf(0), [[0, 1]]);
});

test("frames are cut out of the sheet row by row", () => {
  const sheet = { width: 360, height: 144 };
  const corners = [0, 1, 2, 3, 5].map((frame) => cornerOf(frame, { columns: 3, rows: 2 }, sheet));
  assert.deepEqual(corners, [[0, 0], [120, 0], [240, 0], [0, 72], [240, 72]]);
});

test("clips are as large as the page's own previews", () => {
  assert.deepEqual(sizeOf({ width: 120, height: 68, max_edge: 512 }), [512, 290]);
  assert.deepEqual(sizeOf({ width: 68, height: 120, max_edge: 512 }), [290, 512]);
  assert.deepEqual(sizeOf({ width: 8, height: 8, max_edge: 256 }), [256, 256]);
  assert.deepEqual(sizeOf({ width: 2000, height: 1, max_edge: 512 }), [512, 1]);
});

test("a node is found in the subgraphs that its id names", () => {
  const graphOf = (nodes) => ({ getNodeById: (id) => nodes[id] ?? null });
  const inner = { title: "sampler" };
  const graph = graphOf({ 12: { subgraph: graphOf({ 3: { subgraph: graphOf({ 4: inner }) } }) } });
  assert.equal(findNode(graph, "12:3:4"), inner);
  for (const id of ["3", "12:4", "12:3:4:1", "12:3:5", ""]) assert.equal(findNode(graph, id), null, id);
  assert.equal(findNode(undefined, "12"), null);
  const byNumber = { getNodeById: (id) => (id === 5 ? inner : undefined) };
  assert.equal(findNode(byNumber, "5"), inner);
});

// --- playing ------------------------------------------------------------------------------------

test("a clip plays from its first to its last picture, again and again, twelve a second", async () => {
  const made = page();
  await made.player.add(clipOf("a"));
  await settled();
  assert.deepEqual([...made.timers.values()].map(({ ms }) => Math.round(ms)), [83]);
  await made.run(1000);
  assert.equal(pictures(made), "0 1 2 3 4 0 1 2 3 4 0 1");
  assert.equal(made.drawn, 5, "each is drawn once");
});

test("the motion goes on where it is when the next clip of the same length comes", async () => {
  const made = page();
  await made.player.add(clipOf("a"));
  await made.run(260);
  await made.player.add(clipOf("b"));
  await settled();
  await made.run(180);
  assert.deepEqual(made.shown, ["a 0", "a 1", "a 2", "a 3", "b 3", "b 4", "b 0"].map((p) => `12: ${p}`));
  assert.equal(made.timers.size, 1);
});

test("after a hundred clips there is one sheet and one timer", async () => {
  const made = page();
  for (let index = 0; index < 100; index += 1) {
    await made.player.add(clipOf(`${index}`));
    await made.run(1010);
  }
  assert.deepEqual([made.open, made.timers.size], [1, 1]);
  assert.ok(made.shown.length >= 1200);
});

test("of clips that open late only the latest plays", async () => {
  const made = page();
  let ready;
  made.opening = new Promise((resolve) => (ready = resolve));
  const adding = [made.player.add(clipOf("a")), made.player.add(clipOf("b"))];
  ready();
  await Promise.all(adding);
  await made.run(500);
  assert.ok(made.shown.every((line) => line.includes("b ")));
  assert.equal(made.open, 1);
});

test("two nodes play side by side", async () => {
  const made = page();
  await made.player.add(clipOf("a"));
  await made.player.add(clipOf("b", { node: "7:3", count: 5 }));
  await made.run(500);
  assert.equal(made.timers.size, 1);
  assert.deepEqual(new Set(made.shown.map((line) => line.split(" ")[0])), new Set(["12:", "7:3:"]));
});

test("a clip takes its place again when the page shows a still of its own", async () => {
  const made = page();
  await made.player.add(clipOf("a"));
  await settled();
  made.shown.length = 0;
  made.player.onStill("12");
  made.player.onStill("99");
  assert.deepEqual(made.shown, ["12: a 0"], "at once: the still is never painted");
});

test("clips that are renewed slower than a second stay, however slow the steps are", async () => {
  const made = page();
  for (let step = 0; step < 4; step += 1) {
    made.player.onStill("12"); // first the still of a step, then its clip
    await made.player.add(clipOf(`${step}`));
    await made.run(30000);
  }
  assert.equal(made.timers.size, 1);
  assert.ok(made.shown.at(-1).includes("3 "));
});

test("a clip that gets no successor gives way to the stills", async () => {
  const made = page();
  await made.player.add(clipOf("a"));
  for (let step = 0; step < 50; step += 1) {
    await made.run(90);
    made.player.onStill("12");
  }
  assert.deepEqual([made.open, made.timers.size], [0, 0]);
  made.shown.length = 0;
  made.player.onStill("12");
  assert.deepEqual(made.shown, []);
});

// --- the end ------------------------------------------------------------------------------------

test("the end of the run leaves no timer, no sheet, and shows nothing more", async () => {
  const made = page();
  await made.player.add(clipOf("a"));
  await made.run(300);
  const shown = made.shown.length;
  made.player.stop();
  made.player.onStill("12");
  await made.run(1000);
  assert.deepEqual([made.open, made.timers.size, made.shown.length], [0, 0, shown]);
});

test("a clip that is still being opened or drawn at the end is not shown", async () => {
  const made = page();
  let opened, drawn;
  made.opening = new Promise((resolve) => (opened = resolve));
  made.drawing = new Promise((resolve) => (drawn = resolve));
  const adding = made.player.add(clipOf("a"));
  made.player.stop();
  opened();
  await adding;
  await made.player.add(clipOf("b"));
  made.player.stop();
  drawn();
  await settled();
  assert.deepEqual([made.open, made.timers.size, made.shown.length], [0, 0, 0]);
});

test("when another node runs, the clips of the others end", async () => {
  const made = page();
  await made.player.add(clipOf("a"));
  await made.player.add(clipOf("b", { node: "7:3" }));
  made.player.stop("7:3");
  made.shown.length = 0;
  await made.run(300);
  assert.ok(made.shown.length && made.shown.every((line) => line.startsWith("7:3:")));
  assert.deepEqual([made.open, made.timers.size], [1, 1]);
});

test("a clip ends with its node, and comes back with it", async () => {
  const made = page();
  await made.player.add(clipOf("a"));
  made.nodes.delete("12"); // deleted, or another workflow is open
  await made.run(300);
  assert.deepEqual([made.open, made.timers.size], [0, 0]);
  await made.player.add(clipOf("b"));
  assert.deepEqual([made.open, made.timers.size], [0, 0]);
  made.nodes.add("12");
  await made.player.add(clipOf("c"));
  await settled();
  assert.equal(made.shown.at(-1), "12: c 0");
});

for (const failing of ["open", "draw"]) {
  test(`a page that cannot ${failing} a picture says so and keeps its stills`, async () => {
    const made = page();
    made.failing = failing;
    await made.player.add(clipOf("a"));
    await settled();
    assert.deepEqual(made.complaints, [failing === "open" ? "no picture" : "no canvas"]);
    assert.deepEqual([made.open, made.timers.size, made.shown.length], [0, 0, 0]);
  });
}
