// preview.js on a page of stand-ins: the old front end never revokes what it replaces, the new one does.
import assert from "node:assert/strict";
import { cpSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { pathToFileURL } from "node:url";

const WEB = new URL("../../web/", import.meta.url);
const served = mkdtempSync(join(tmpdir(), "skyreels-preview-"));
after(() => rmSync(served, { recursive: true }));

const API = `
class Api extends EventTarget {
  dispatchCustomEvent(name, detail) {
    const event = new Event(name);
    event.detail = detail;
    this.dispatchEvent(event);
  }
}
export const api = new Api();
`;
const APP = `
export const app = {
  nodePreviewImages: {}, rootGraph: { getNodeById: (id) => app.nodes[id] ?? null },
  nodes: { 12: { comfyClass: "SkyReelsSampler" } }, drawn: 0,
  canvas: { setDirty: () => { app.drawn += 1; } },
  registerExtension: (extension) => { app.extension = extension; },
};
`;
const CLIP = {
  node: "12", class_type: "SkyReelsSampler", prompt_id: "p", image: btoa("jpeg"), columns: 1, rows: 1,
  count: 1, width: 8, height: 4, fps: 6, max_edge: 512,
};
const settled = () => new Promise((resolve) => setImmediate(resolve));
let copies = 0;

/** A page with the extension, and what became of its pictures. */
async function load(revokes, { wantsStills = false } = {}) {
  const root = join(served, `${(copies += 1)}`);
  mkdirSync(join(root, "scripts"), { recursive: true });
  cpSync(WEB, join(root, "extensions", "pack"), { recursive: true });
  writeFileSync(join(served, "package.json"), JSON.stringify({ type: "module" }));
  writeFileSync(join(root, "scripts", "app.js"), APP);
  writeFileSync(join(root, "scripts", "api.js"), API);
  const read = (path) => import(pathToFileURL(join(root, path)).href);
  const [{ app }, { api }] = [await read("scripts/app.js"), await read("scripts/api.js")];
  const page = { app, api, live: new Set(), sizes: [], timers: new Set() };

  let made = 0;
  const make = () => {
    page.live.add(`blob:${(made += 1)}`);
    return `blob:${made}`;
  };
  globalThis.document = {
    hidden: false,
    createElement: () => ({
      getContext: () => ({ drawImage: (...values) => page.sizes.push(values.slice(-2)) }),
      toBlob: (finish) => finish({}),
    }),
  };
  globalThis.createImageBitmap = async () => ({ width: 8, height: 4, close: () => {} });
  globalThis.matchMedia = () => ({ matches: wantsStills });
  URL.revokeObjectURL = (address) => page.live.delete(address);
  globalThis.setInterval = (work) => page.timers.add(work) && work;
  globalThis.clearInterval = (work) => page.timers.delete(work);

  api.addEventListener("b_preview_with_metadata", ({ detail }) => { // as the front ends do
    const [before] = app.nodePreviewImages[detail.displayNodeId] ?? [];
    if (revokes) page.live.delete(before);
    app.nodePreviewImages[detail.displayNodeId] = [make()];
  });
  await read("extensions/pack/preview.js");
  app.extension.setup();
  page.send = async (name, detail) => {
    api.dispatchCustomEvent(name, detail);
    await settled();
  };
  page.still = () => page.send("b_preview_with_metadata", { displayNodeId: "12", blob: {} });
  return page;
}

for (const revokes of [false, true]) {
  test(`no picture stays behind where the front end ${revokes ? "revokes" : "never revokes"} its own`, async () => {
    const page = await load(revokes);
    for (let step = 0; step < 100; step += 1) {
      await page.still();
      await page.send("skyreels.preview", CLIP);
      assert.ok(page.live.size <= 3, `${page.live.size} after ${step}`);
    }
    assert.equal(page.timers.size, 1);
    const [shown] = page.app.nodePreviewImages[12];
    assert.deepEqual(page.sizes.at(-1), [512, 256]);
    await page.send("execution_success", { prompt_id: "p" });
    assert.ok(page.live.has(shown), "what is shown stays");
    assert.deepEqual([page.app.nodePreviewImages[12], page.timers.size], [[shown], 0]);
    assert.ok(page.live.size <= 2);
  });
}

test("the last picture of a run is left alone in the next", async () => {
  const page = await load(true);
  await page.send("skyreels.preview", CLIP);
  const [last] = page.app.nodePreviewImages[12];
  await page.send("execution_success", {});
  page.app.nodePreviewImages = {}; // the front end may keep it elsewhere, in its list of runs
  await page.send("skyreels.preview", CLIP);
  await page.send("execution_success", {});
  assert.ok(page.live.has(last));
});

for (const name of ["execution_start", "execution_error", "execution_interrupted", "reconnecting"]) {
  test(`${name} ends the previews`, async () => {
    const page = await load(true);
    await page.send("skyreels.preview", CLIP);
    await page.send(name, {});
    assert.equal(page.timers.size, 0);
    await page.still();
    assert.equal(page.sizes.length, 1, "nothing more is drawn");
  });
}

test("another node that runs ends them, the same one does not", async () => {
  const page = await load(true);
  await page.send("skyreels.preview", CLIP);
  await page.send("executing", "12");
  assert.equal(page.timers.size, 1);
  await page.send("executing", "13");
  assert.equal(page.timers.size, 0);
});

test("nothing is shown on a node that is gone, or on one of another workflow", async () => {
  const page = await load(true);
  page.app.nodes[12] = { comfyClass: "KSampler" };
  await page.send("skyreels.preview", CLIP);
  delete page.app.nodes[12];
  await page.send("skyreels.preview", CLIP);
  assert.deepEqual([page.app.nodePreviewImages, page.timers.size], [{}, 0]);
});

test("who prefers reduced motion sees the stills", async () => {
  const page = await load(true, { wantsStills: true });
  await page.send("skyreels.preview", CLIP);
  await page.still();
  assert.deepEqual([page.sizes.length, page.timers.size, page.live.size], [0, 0, 1]);
});
