// The picture of the templates, which core's Load Image reads: brought into the input folder by the
// page when a workflow asks for it, so that Run finds a person where the prompt speaks of one.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

import { asksForPortrait, PORTRAIT, offer } from "./portrait/find.mjs";
import { t } from "./wiro/language.mjs"; // wiro.js loads the texts

let isThere = false; // as far as this page knows

function known() {
  return window.LiteGraph?.registered_node_types?.LoadImage?.nodeData?.input?.required?.image;
}

/** Upload the picture once; the server keeps a file of the same name and content as it is. */
async function bring() {
  if (isThere || !offer(known(), PORTRAIT)) return;
  const picture = await fetch(new URL("./portrait.jpg", import.meta.url));
  if (!picture.ok) throw new Error(t("HTTP {status} for the picture", { status: picture.status }));
  const body = new FormData();
  body.append("image", new File([await picture.blob()], PORTRAIT, { type: "image/jpeg" }));
  const answer = await api.fetchApi("/upload/image", { method: "POST", body });
  if (!answer.ok) throw new Error(t("HTTP {status} for the upload", { status: answer.status }));
  isThere = true;
}

app.registerExtension({
  name: "skyreels.portrait",
  async beforeConfigureGraph(graph) {
    if (!asksForPortrait(graph)) return;
    try {
      await bring();
    } catch (error) {
      const detail = t(
        "{name} could not be put into the input folder ({reason}): choose another picture in Load Image.",
        { name: PORTRAIT, reason: error.message },
      );
      app.extensionManager?.toast?.add({ severity: "warn", summary: "SkyReels", detail });
    }
  },
  loadedGraphNode(node) {
    if (node.type !== "LoadImage") return;
    const widget = node.widgets?.find(({ name }) => name === "image");
    if (widget?.value === PORTRAIT && isThere) offer([widget.options?.values], PORTRAIT);
  },
});
