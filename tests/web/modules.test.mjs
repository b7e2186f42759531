// The page's modules where they are served: any folder name, any path, beside the page's own scripts.
import assert from "node:assert/strict";
import { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { extname, join } from "node:path";
import { after, test } from "node:test";
import { pathToFileURL } from "node:url";

const WEB = new URL("../../web/", import.meta.url);
const served = mkdtempSync(join(tmpdir(), "skyreels-web-"));
after(() => rmSync(served, { recursive: true }));

const PAGE = `
const asked = [];
export const app = { asked, registerExtension: (extension) => asked.push(extension) };
export const api = {
  asked,
  base: "",
  apiURL: (path) => api.base + "/api" + path,
  addEventListener: () => {},
  fetchApi: async (path, options) => {
    asked.push([api.apiURL(path), options]);
    return { ok: true, status: 200, json: async () => ({}) };
  },
};
`;

/** The tree as a server shows it below `base`. */
async function serve(base) {
  const root = join(served, base);
  const pack = join(root, "extensions", "a pack of another name");
  mkdirSync(join(root, "scripts"), { recursive: true });
  cpSync(WEB, pack, { recursive: true });
  writeFileSync(join(served, "package.json"), JSON.stringify({ type: "module" }));
  for (const name of ["app.js", "api.js"]) writeFileSync(join(root, "scripts", name), PAGE);
  const load = (path) => import(pathToFileURL(join(root, path)).href);
  const own = (path) => load(join("extensions", "a pack of another name", path));
  return { app: (await load("scripts/app.js")).app, api: (await load("scripts/api.js")).api, own };
}

for (const base of ["", "comfy", "a/b/c"]) {
  test(`all modules load below ${base || "the root"} and share the page's own scripts`, async () => {
    const { app, api, own } = await serve(base);
    await own("skyreels.js");
    await own("preview.js");
    await own("wiro.js");
    await own("portrait.js");
    const names = app.asked.map((extension) => extension.name);
    assert.deepEqual(names, [
      "skyreels.colors", "skyreels.preview", "skyreels.wiro", "skyreels.portrait",
    ]);
    const { get, post, fileLink } = await own("wiro/server.mjs");
    api.base = `/${base}`;
    await get("account");
    await post("limits", { per_run: null });
    const [[first, { headers }], [second, options]] = api.asked;
    assert.ok(headers["X-SkyReels-Page"], "what tells the server that its own page asks");
    assert.equal(first, `/${base}/api/skyreels/wiro/account`);
    assert.equal(second, `/${base}/api/skyreels/wiro/limits`);
    assert.equal(options.headers["Content-Type"], "application/json");
    assert.ok(fileLink(1, { filename: "0.mp4" }).url.startsWith(`/${base}/api/view?`));
    assert.ok(fileLink(1, { filename: "0.svg" }).url.startsWith(`/${base}/api/skyreels/`));
  });
}

test("no module names an address from the server's root", () => {
  const files = readdirSync(WEB, { recursive: true, withFileTypes: true });
  const scripts = files.filter((file) => [".js", ".mjs", ".css"].includes(extname(file.name)));
  assert.ok(scripts.length >= 10);
  for (const { name, parentPath, path } of scripts) {
    const text = readFileSync(join(parentPath ?? path, name), "utf8");
    assert.doesNotMatch(text, /(from|import)\s*\(?\s*["'`]\//, name);
    assert.doesNotMatch(text, /url\(\s*["']?\//, name);
    // a file beside the module is found under any path
    const others = text.replaceAll(/fetch\(new URL\("\.\/[\w.]+", import\.meta\.url\)\)/g, "");
    assert.doesNotMatch(others, /\b(fetch|WebSocket|EventSource|XMLHttpRequest)\s*\(/, name);
    assert.doesNotMatch(text, /(href|src)\s*[:=]\s*["'`]\//, name);
  }
});
