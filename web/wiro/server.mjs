// Questions to the package's own routes.
import { api } from "/scripts/api.js";

const UNREACHABLE = "The ComfyUI server is not reachable.";

/** What went wrong, as one sentence; isOffline: nobody answered at all. */
export class ServerError extends Error {
  constructor(message, isOffline = false) {
    super(message);
    this.isOffline = isOffline;
  }
}

export function get(path) {
  return answer(path, { cache: "no-store" });
}

export function post(path, body = {}) {
  return answer(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}

async function answer(path, options) {
  let response;
  try {
    response = await api.fetchApi(`/skyreels/wiro/${path}`, options);
  } catch {
    throw new ServerError(UNREACHABLE, true);
  }
  const body = await response.json().catch(() => null); // a proxy's error page is no JSON
  if (response.ok && body !== null) return body;
  if (typeof body?.error === "string" && body.error) throw new ServerError(body.error);
  throw new ServerError(`The ComfyUI server answered with HTTP ${response.status}.`);
}

/** Where the page finds a file of the output folder. */
export function fileUrl(file) {
  const { filename, subfolder = "", type = "output" } = file;
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}
