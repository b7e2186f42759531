// Requests to the package's own routes, through the page's api, which knows the base path.
import { api } from "../../../scripts/api.js";
import { t } from "./language.mjs";
import { linkOf } from "./links.mjs";

/** One sentence. isOffline: there was no answer at all. status: of HTTP. */
export class ServerError extends Error {
  constructor(message, { isOffline = false, status = 0 } = {}) {
    super(message);
    this.isOffline = isOffline;
    this.status = status;
  }
}

export function get(path) {
  // no other page can send this header: it proves that the request is from this page
  return answer(path, { cache: "no-store", headers: { "X-SkyReels-Page": "1" } });
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
    throw new ServerError(t("Cannot reach the ComfyUI server."), { isOffline: true });
  }
  const body = await response.json().catch(() => null); // a proxy's error page is not JSON
  if (response.ok && body !== null) return body;
  const { status } = response;
  if (typeof body?.error === "string" && body.error) throw new ServerError(body.error, { status });
  throw new ServerError(t("The ComfyUI server answered with HTTP {status}.", { status }), { status });
}

/** {url, kind, isDownload} of a task's file. */
export function fileLink(row, file) {
  const link = linkOf(row, file);
  return { ...link, url: api.apiURL(link.path) };
}
