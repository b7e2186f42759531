// Where a task's files are, and which of them the page shows. No page in here.

// by their names' ends, because by these ComfyUI's server says what a file is
const KINDS = {
  image: ["png", "jpg", "jpeg", "webp", "gif", "avif", "bmp"],
  video: ["mp4", "webm", "mov", "m4v", "mkv"],
  audio: ["mp3", "wav", "flac", "ogg", "opus", "m4a", "aac"],
};
// a name with one of these is no plain name, and servers differ in what they make of it
const ODD = /[:;?#%&/\\\p{C}]|^\.|[.\s]$/u;

/** "image", "video" or "audio"; "other" for all that may hold a script, or is not known. */
export function kindOf(filename) {
  if (typeof filename !== "string" || ODD.test(filename)) return "other";
  const suffix = /^.+\.([a-z0-9]+)$/is.exec(filename)?.[1].toLowerCase();
  return Object.keys(KINDS).find((kind) => KINDS[kind].includes(suffix)) ?? "other";
}

/**
 * {path, kind, isDownload}: the path on the server, below the page's own base.
 *
 * What is not sure to be a picture, film or sound is never opened where ComfyUI's page is: our own
 * route hands it out as a download, however the link is opened.
 */
export function linkOf(taskRow, file) {
  const { filename, subfolder = "", type = "output" } = file;
  const kind = kindOf(filename);
  const path =
    kind === "other"
      ? `${taskPath(taskRow, "file")}?${new URLSearchParams({ name: filename })}`
      : `/view?${new URLSearchParams({ filename, subfolder, type })}`;
  return { path, kind, isDownload: kind === "other" };
}

/** The route that does something to a task, or tells of it. */
export function taskPath(row, verb) {
  return `/skyreels/wiro/tasks/${row}/${verb}`;
}
