// Moving previews: while a clip is sampled, its node shows it moving, where the page shows a still.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

import { cornerOf, createPlayer, findNode, layersOf, sizeOf } from "./preview/player.mjs";

const STILL = "b_preview_with_metadata"; // the page's own event of a preview
const ENDS = ["execution_start", "execution_success", "execution_error", "execution_interrupted",
              "reconnecting"];

let canvas = null; // where pictures are drawn
let isShowing = false; // a picture of ours is being handed to the page
let handed = []; // addresses of pictures of ours that the page shows
let replaced = []; // addresses that it shows no longer
let hasComplained = false;

async function open({ image }) {
  const bytes = Uint8Array.from(atob(image), (letter) => letter.charCodeAt(0));
  return createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
}

function draw(sheet, clip, picture) {
  canvas ??= document.createElement("canvas");
  [canvas.width, canvas.height] = sizeOf(clip);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  for (const [frame, opacity] of layersOf(picture)) {
    context.globalAlpha = opacity;
    context.drawImage(sheet, ...cornerOf(frame, clip, sheet), clip.width, clip.height,
                      0, 0, canvas.width, canvas.height);
  }
  return new Promise((resolve, reject) => {
    const finish = (blob) => (blob ? resolve(blob) : reject(new Error("cannot encode a picture")));
    canvas.toBlob(finish, "image/jpeg", 0.9);
  });
}

/** Hand a picture to the page as it gets its own, so that it is shown wherever those are. */
function show({ node, prompt_id: job }, blob) {
  const before = new Set([...addresses(), ...handed]);
  isShowing = true;
  try {
    api.dispatchCustomEvent(STILL, {
      blob, nodeId: node, displayNodeId: node, parentNodeId: node, realNodeId: node,
      promptId: job, jobId: job,
    });
  } finally {
    isShowing = false;
  }
  release();
  const now = addresses();
  handed = now.filter((address) => handed.includes(address) || !before.has(address));
  replaced = [...before].filter((address) => !now.includes(address));
  app.canvas?.setDirty(true, false);
}

function addresses() {
  return [...new Set(Object.values(app.nodePreviewImages ?? {}).flat())];
}

// front ends such as 1.27 never do; one picture later, as the last may still be loading
function release() {
  for (const address of replaced) URL.revokeObjectURL(address);
  replaced = [];
}

function isThere({ node, class_type: type }) {
  return findNode(app.rootGraph ?? app.graph, node)?.comfyClass === type; // not of another workflow
}

function complain(error) {
  if (!hasComplained) console.warn("[SkyReels] no moving previews:", error);
  hasComplained = true;
}

const player = createPlayer({
  open, draw, show, isThere, complain,
  clock: {
    now: () => performance.now(),
    setInterval: (work, ms) => setInterval(() => document.hidden || work(), ms),
    clearInterval: (timer) => clearInterval(timer),
  },
});

function end(except = null) {
  player.stop(except);
  release();
  handed = []; // the last one stays on the node, and is the page's from now on
}

app.registerExtension({
  name: "skyreels.preview",
  // after the page's own listeners, which have shown a still by then
  setup() {
    const wantsStills = matchMedia("(prefers-reduced-motion: reduce)");
    api.addEventListener("skyreels.preview", ({ detail }) => {
      if (!wantsStills.matches) player.add(detail);
    });
    api.addEventListener(STILL, ({ detail }) => {
      if (!isShowing) player.onStill(detail.displayNodeId);
    });
    api.addEventListener("executing", ({ detail }) => end(detail));
    for (const name of ENDS) api.addEventListener(name, () => end());
  },
});
