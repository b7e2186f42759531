// Where a task's files are, and which of them the page shows. Does not touch the page.

// by file extension: ComfyUI's server derives the content type from it
const KINDS = {
  image: ["png", "jpg", "jpeg", "webp", "gif", "avif", "bmp"],
  video: ["mp4", "webm", "mov", "m4v", "mkv"],
  audio: ["mp3", "wav", "flac", "ogg", "opus", "m4a", "aac"],
};
// servers disagree about names with these characters
const UNSAFE_NAME = /[:;?#%&/\\\p{C}]|^\.|[.\s]$/u;

/** "image", "video" or "audio"; "other" for what is unknown or may contain a script. */
export function kindOf(filename) {
  if (typeof filename !== "string" || UNSAFE_NAME.test(filename)) return "other";
  const suffix = /^.+\.([a-z0-9]+)$/is.exec(filename)?.[1].toLowerCase();
  return Object.keys(KINDS).find((kind) => KINDS[kind].includes(suffix)) ?? "other";
}

/**
 * {path, kind, isDownload}: the path on the server, below the page's own base.
 *
 * Anything but an image, video or audio is never opened in ComfyUI's origin: our own route serves it
 * as a download, however the link is opened.
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

/** The route of an action on a task. */
export function taskPath(row, verb) {
  return `/skyreels/wiro/tasks/${row}/${verb}`;
}
