// Write web/docs/pictures/<NodeId>.webp: each node in a real ComfyUI, between its usual neighbours.
//
//   PW_DIR=FOLDER node tests/scripts/node_pictures.mjs http://127.0.0.1:8188 [NodeId...]
//
// A ComfyUI with this pack must be running there, set to the stand-in of Wiro (CONTRIBUTING.md,
// Tests) so that the badges show prices. FOLDER holds playwright-core (npm); CHROMIUM names the
// browser (/usr/bin/chromium). Requests to other hosts are blocked.
import { mkdirSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const [url, ...wanted] = process.argv.slice(2);
const FOLDER = fileURLToPath(new URL("../../web/docs/pictures/", import.meta.url));
const MARGIN = 24; // around the nodes, in pixels of the page
const SCALE = 0.8; // of the picture

const MODEL = ["SkyReelsTransformerLoader", "model"];
const VAE = ["SkyReelsVAELoader", "vae"];
const TEXT = ["SkyReelsTextEncode", "conditioning"];
const SIZED = ["SkyReelsImageConditioning", "image_conditioning"];
const SAMPLER = (input) => ["SkyReelsSampler", input];
const LOADED = ["LoadImage", "IMAGE"];
const SAVE = ["SaveVideo", "video"];

/** Node -> {before: {input: [node, output]}, after: {output: [node, input]}, values}. */
const PLACES = {
  SkyReelsTransformerLoader: { after: { model: SAMPLER("model") } },
  SkyReelsVAELoader: {
    after: { vae: ["SkyReelsImageConditioning", "vae"] }, more: { vae: ["SkyReelsVAEDecode", "vae"] },
  },
  SkyReelsLoraLoader: { before: { model: MODEL }, after: { model: SAMPLER("model") } },
  SkyReelsTextEncoderLoader: { after: { text_encoder: ["SkyReelsTextEncode", "text_encoder"] } },
  SkyReelsTextEncode: {
    before: { text_encoder: ["SkyReelsTextEncoderLoader", "text_encoder"] },
    after: { conditioning: SAMPLER("positive") },
    values: { prompt: "FPS-24, A woman in a red coat turns to the camera and smiles." },
  },
  SkyReelsImageConditioning: {
    before: { vae: VAE, image: LOADED }, after: { image_conditioning: SAMPLER("image") },
  },
  SkyReelsScheduler: { after: { sigmas: SAMPLER("sigmas") } },
  SkyReelsGuidance: { after: { guidance: SAMPLER("guidance") } },
  SkyReelsContextWindows: { after: { windows: SAMPLER("windows") } },
  SkyReelsSampler: {
    before: { model: MODEL, positive: TEXT, negative: TEXT, image: SIZED },
    after: { samples: ["SkyReelsVAEDecode", "samples"] },
  },
  SkyReelsVAEDecode: {
    before: { vae: VAE, samples: ["SkyReelsSampler", "samples"] },
    after: { images: ["CreateVideo", "images"] },
  },
  SkyReelsExtendVideo: {
    before: { model: MODEL, vae: VAE, images: ["SkyReelsVAEDecode", "images"], positive: TEXT, negative: TEXT },
    after: { images: ["CreateVideo", "images"] },
  },
  SkyReelsPlan: { run: true, values: { width: 64, height: 64, num_frames: 17 } },
  SkyReelsCoreModel: {
    before: { model: MODEL, image: SIZED }, after: { model: ["KSampler", "model"] },
  },
  WiroRemoteI2V: {
    before: { image: LOADED }, after: { video: SAVE },
    values: { prompt: "A woman in a red coat turns to the camera and smiles." },
  },
  WiroRunModel: {
    before: { image: LOADED }, after: { video: SAVE },
    values: { model: "wiro/SkyReels-V1", parameters: '{"prompt": "a woman smiles", "size": "960x544"}' },
  },
  WiroTaskResult: { after: { video: SAVE }, values: { task: "2221" } },
  WiroUploadFile: { before: { image: LOADED }, after: { url: ["WiroRunModel", "parameters"] } },
  WiroSubmit: {
    before: { image: LOADED }, after: { runs: ["WiroCollect", "runs"] },
    values: { prompt: "A woman in a red coat turns to the camera and smiles." },
  },
  WiroCollect: { before: { runs: ["WiroSubmit", "runs"] }, after: { video: SAVE } },
  SkyReelsI2V: {
    before: { image: LOADED }, after: { video: SAVE },
    values: { prompt: "A woman in a red coat turns to the camera and smiles." },
  },
  SkyReelsFromReceipt: {
    after: { seed: SAMPLER("seed"), width: ["SkyReelsImageConditioning", "width"] },
    more: { precision: ["SkyReelsTransformerLoader", "precision"], decode: ["SkyReelsVAEDecode", "mode"] },
    values: { receipt: "video/clip.mp4 [output]" },
  },
};

/** In the page: draw one node with collapsed neighbours; {x, y, width, height} of the drawing. */
async function draw({ name, place, margin }) {
  const { app, LiteGraph } = window;
  app.graph.clear();
  const add = (type, x, y) => {
    const node = LiteGraph.createNode(type);
    if (!node) throw new Error(`no node ${type}`);
    node.pos = [x, y];
    app.graph.add(node);
    return node;
  };
  const node = add(name, 0, 0);
  for (const [key, value] of Object.entries(place.values ?? {})) {
    node.widgets.find((widget) => widget.name === key).value = value;
  }
  node.setSize([Math.max(node.size[0], 330), node.size[1]]);
  const slot = (list, key) => list.findIndex((one) => one.name === key);
  const collapse = (other) => {
    other.flags.collapsed = true;
    other.title = other.title.replace("SkyReels ", ""); // the page cuts it after 20 letters
    other._collapsed_width = 170;
  };
  Object.entries(place.before ?? {}).forEach(([input, [type, output]], index) => {
    const other = add(type, -320, index * 56);
    other.connect(Math.max(slot(other.outputs, output), 0), node, slot(node.inputs, input));
    collapse(other);
  });
  const targets = [...Object.entries(place.after ?? {}), ...Object.entries(place.more ?? {})];
  targets.forEach(([output, [type, input]], index) => {
    const other = add(type, node.size[0] + 90, index * 56);
    const at = slot(other.inputs, input);
    node.connect(slot(node.outputs, output), other, at < 0 ? input : at);
    collapse(other);
  });
  if (place.run) {
    await app.queuePrompt(0, 1);
    await new Promise((resolve) => app.api.addEventListener("execution_success", resolve, { once: true }));
    node.setSize([560, node.computeSize()[1] + 170]);
  }
  const boxes = app.graph._nodes.map((one) => {
    const width = one.flags.collapsed ? 190 : one.size[0];
    const height = one.flags.collapsed ? 0 : one.size[1];
    return [one.pos[0], one.pos[1] - 30, one.pos[0] + width, one.pos[1] + height];
  });
  const low = [0, 1].map((axis) => Math.min(...boxes.map((box) => box[axis])));
  const high = [2, 3].map((axis) => Math.max(...boxes.map((box) => box[axis])));
  const corner = [360, 140]; // clear of the page's own bars
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [corner[0] - low[0], corner[1] - low[1]];
  app.canvas.deselectAllNodes?.();
  app.canvas.setDirty(true, true);
  const badges = name.startsWith("Wiro") || name === "SkyReelsI2V" ? 26 : 0; // above the node
  await new Promise((resolve) => setTimeout(resolve, badges ? 2600 : 900)); // a price comes by then
  return {
    x: corner[0] - margin, y: corner[1] - margin - badges,
    width: high[0] - low[0] + 2 * margin, height: high[1] - low[1] + 2 * margin + badges,
  };
}

const require = createRequire(join(process.env.PW_DIR || process.cwd(), "x.js"));
const browser = await require("playwright-core").chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
});
try {
  const page = await browser.newPage({ viewport: { width: 1700, height: 1400 } });
  const { host } = new URL(url);
  await page.route("**/*", (route) => {
    const address = new URL(route.request().url());
    const isOwn = ["data:", "blob:"].includes(address.protocol) || address.host === host;
    return isOwn ? route.continue() : route.abort();
  });
  const data = {
    "Comfy.TutorialCompleted": true, "Comfy.Locale": "en", "Comfy.Minimap.Visible": false,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None", "Comfy.NodeBadge.NodeIdBadgeMode": "None",
    "Comfy.Graph.CanvasInfo": false,
  };
  await page.request.post(`${url}/api/settings`, { data });
  await page.goto(url);
  const isReady = () => window.app?.graph && window.LiteGraph?.registered_node_types?.SkyReelsSampler;
  await page.waitForFunction(isReady, null, { timeout: 90000 });
  await page.waitForTimeout(2000);
  for (let count = 0; count < 3; count += 1) await page.keyboard.press("Escape");
  const session = await page.context().newCDPSession(page);
  mkdirSync(FOLDER, { recursive: true });
  for (const [name, place] of Object.entries(PLACES)) {
    const isThere = await page.evaluate((id) => id in window.LiteGraph.registered_node_types, name);
    if (!isThere || (wanted.length && !wanted.includes(name))) continue;
    const clip = await page.evaluate(draw, { name, place, margin: MARGIN });
    const { data: picture } = await session.send("Page.captureScreenshot", {
      format: "webp", quality: 72, clip: { ...clip, scale: SCALE },
    });
    writeFileSync(join(FOLDER, `${name}.webp`), Buffer.from(picture, "base64"));
    console.log(name, Math.round(clip.width), Math.round(clip.height), Buffer.from(picture, "base64").length);
  }
} finally {
  await browser.close();
}
