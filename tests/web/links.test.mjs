// Which files the page opens, which it only hands out, and where they are.
import assert from "node:assert/strict";
import { test } from "node:test";

import { kindOf, linkOf, taskPath } from "../../web/wiro/links.mjs";

const SHOWN = {
  image: ["0.png", "0.PNG", "a.jpg", "a.jPeG", "a.webp", "a.gif", "a.avif", "a.bmp", "x.svg.png",
          "ein Bild (2).png", "\u732b.png", "a.b.c.png"],
  video: ["0.mp4", "0.MP4", "a.webm", "a.mov", "a.m4v", "a.mkv", "x.html.mp4"],
  audio: ["0.mp3", "a.WAV", "a.flac", "a.ogg", "a.opus", "a.m4a", "a.aac"],
};
const HANDED_OUT = [
  // active, in every spelling, with every suffix before and after
  "x.svg", "X.SVG", "x.SvG", "x.svgz", "x.png.svg", "x.mp4.SVG", "x.svg.gz", "x.html", "x.HTM",
  "x.htm", "x.xhtml", "x.xht", "x.shtml", "x.xml", "x.XML", "x.xsl", "x.xslt", "x.rdf", "x.atom",
  "x.mml", "x.mathml", "x.js", "x.mjs", "x.css", "x.pdf", "x.swf", "x.mht", "x.mhtml", "x.svg+xml",
  // no suffix, or none that is known
  "x", "", ".", "..", ".png", ".svg", "x.", "x.png.", "x.png ", "x. png", "x.txt", "x.json", "x.zip",
  "x.md", "x.bin", "x.exe", "png", "x.pngx", "x.xpng", "x.p\u0578g", "x.\uff50ng", "x.mp4\u200b",
  // what servers may read as something else than a name
  "data:text/html,x.png", "data:image/svg+xml,x.png", "a:b.svg?.png", "x.svg?.png", "x.svg#.png",
  "x.svg%00.png", "x.svg\u0000.png", "x.svg;.png", "x.svg/.png", "x.svg\\.png", "../x.png",
  "x.svg\n.png", "x.svg\r\n.png", "x.svg&.png", "\u202egnp.svg.png",
  // no name at all
  undefined, null, 7, {}, ["x.png"],
];

test("pictures, films and sounds are shown", () => {
  for (const [kind, names] of Object.entries(SHOWN)) {
    for (const name of names) assert.equal(kindOf(name), kind, name);
  }
});

test("whatever else is never opened beside ComfyUI's page", () => {
  for (const filename of HANDED_OUT) {
    assert.equal(kindOf(filename), "other", JSON.stringify(filename));
    const { path, isDownload } = linkOf(7, { filename });
    assert.ok(isDownload);
    assert.ok(path.startsWith("/skyreels/wiro/tasks/7/file?name="), path);
    assert.ok(!path.includes("/view"));
  }
});

test("what the server calls a file does not make it one", () => {
  assert.ok(linkOf(1, { filename: "x.svg", kind: "image" }).isDownload);
  assert.equal(linkOf(1, { filename: "x.png", kind: "other" }).isDownload, false);
});

test("a shown file is asked for by its place in the output folder", () => {
  const file = { filename: "a b.png", subfolder: "wiro/2221", type: "output" };
  const path = "/view?filename=a+b.png&subfolder=wiro%2F2221&type=output";
  assert.deepEqual(linkOf(1, file), { path, kind: "image", isDownload: false });
  assert.equal(linkOf(1, { filename: "a.mp4" }).path, "/view?filename=a.mp4&subfolder=&type=output");
});

test("names are data in an address", () => {
  const { path } = linkOf(1, { filename: "a&type=input#.svg" });
  assert.equal(new URL(path, "http://x").searchParams.get("name"), "a&type=input#.svg");
  assert.equal(new URL(path, "http://x").hash, "");
});

test("paths begin at the page's base", () => {
  assert.equal(taskPath(12, "stop"), "/skyreels/wiro/tasks/12/stop");
});
