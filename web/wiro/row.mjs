// One task of the list. Its elements are created once and updated in place, so that an open log, a
// playing video and the keyboard focus survive every event.
import { actionButton, confirmButton, make, setLine, setText } from "./dom.mjs";
import { addResultNode } from "./graph.mjs";
import { t } from "./language.mjs";
import { fileLink, post } from "./server.mjs";
import { costOf, describe, durationOf, possible, timeOf } from "./words.mjs";

const MAX_FIGURES = 6; // further files of a task are links only

export class TaskRow {
  constructor(task) {
    this.id = task.id;
    this.onUpdate = () => {}; // called with each new version of the task
    this.pauses = 0; // polls to skip after errors
    this.failures = 0;
    this.files = new Map();
    this.element = make("li", "skw-row");
    this.#build();
    this.update(task);
  }

  #build() {
    this.word = make("span", "skw-word");
    this.cost = make("span", "skw-cost");
    this.model = make("div", "skw-model");
    this.when = make("time");
    this.facts = make("span");
    this.bar = make("div", "skw-bar", { "aria-label": t("Progress"), role: "progressbar" });
    this.bar.setAttribute("aria-valuemin", "0");
    this.bar.setAttribute("aria-valuemax", "100");
    this.fill = make("div", "skw-fill");
    this.bar.append(this.fill);
    this.line = make("div", "skw-line");
    this.progress = make("div", "skw-progress", {}, this.bar, this.line);
    this.media = make("div", "skw-media");
    this.error = make("p", "skw-error");
    this.warning = make("p", "skw-warning");
    this.note = make("p", "skw-note", { role: "status" });
    this.#buildLog();
    this.#buildButtons();
    this.group = make(
      "div", "skw-group", { role: "group" },
      make("div", "skw-head", {}, this.word, this.cost),
      this.model,
      make("div", "skw-faint skw-facts", {}, this.when, this.facts),
      this.progress, this.media, this.error, this.warning, this.log, this.actions, this.note,
    );
    this.element.append(this.group);
  }

  #buildLog() {
    this.logTitle = make("summary");
    this.logText = make("pre", "skw-log", { tabindex: "0" });
    this.log = make("details", "", {}, this.logTitle, this.logText);
    this.log.addEventListener("toggle", () => this.#scrollLog());
  }

  #buildButtons() {
    this.links = make("span", "skw-links");
    this.buttons = {
      collect: actionButton(t("Collect into graph"), () => this.#addNode()),
      download: actionButton(t("Download"), () => this.#act("collect", t("Downloaded."))),
      stop: confirmButton(t("Stop"), t("Really stop?"), () => this.#act("stop", "")),
      erase: confirmButton(t("Delete remote files"), t("Really delete?"), () =>
        this.#act("delete_files", t("Wiro's copies were deleted.")),
      ),
      forget: confirmButton(t("Mark as not started"), t("Really not started?"), () =>
        this.#act("forget", ""),
      ),
    };
    this.buttons.collect.title = t("Add a Wiro Task Result node for this task to the graph");
    this.buttons.download.title = t("Download the files into the output folder");
    this.buttons.erase.title = t("Delete this task's files at Wiro; downloaded files stay");
    this.actions = make("div", "skw-buttons", {}, this.links, ...Object.values(this.buttons));
  }

  update(task) {
    const state = describe(task);
    this.task = task;
    this.state = state;
    this.onUpdate(task);
    this.element.dataset.tone = state.tone;
    setText(this.word, t(state.word));
    setText(this.cost, costOf(task));
    setText(this.model, task.model);
    this.model.title = task.model;
    this.group.setAttribute("aria-label", `${task.model} ${task.taskid}: ${t(state.word)}`);
    this.tick();
    this.#updateProgress();
    this.#updateFiles();
    this.#updateLog();
    setLine(this.error, task.error);
    setLine(this.warning, t(state.warning));
    this.#updateButtons();
  }

  /** Update what changes with time. */
  tick() {
    const { task } = this;
    const parts = [durationOf(task, Date.now() / 1000), task.taskid && t("task {id}", { id: task.taskid })];
    if (task.remote_deleted) parts.push(t("remote files deleted"));
    setText(this.when, timeOf(task.created_at));
    setText(this.facts, parts.filter(Boolean).map((part) => ` · ${part}`).join(""));
    this.when.title = new Date(task.created_at * 1000).toLocaleString();
  }

  #updateProgress() {
    const { fraction } = this.task;
    const isKnown = typeof fraction === "number";
    this.progress.hidden = !this.state.isActive;
    this.bar.classList.toggle("skw-unknown", !isKnown);
    const percent = isKnown ? Math.round(Math.min(Math.max(fraction, 0), 1) * 100) : 0;
    if (isKnown) this.bar.setAttribute("aria-valuenow", percent);
    else this.bar.removeAttribute("aria-valuenow");
    this.fill.style.width = isKnown ? `${percent}%` : "";
    setText(this.line, this.task.line || t(this.state.line) || "\u00a0"); // keeps its height
    this.line.title = this.task.line;
  }

  #updateFiles() {
    const shown = new Map();
    for (const { filename, ...place } of this.task.files) {
      const link = fileLink(this.id, { filename, ...place });
      shown.set(link.url, { ...link, filename });
    }
    for (const [url, made] of this.files) {
      if (shown.has(url)) continue;
      made.figure?.remove();
      made.link.remove();
      this.files.delete(url);
    }
    for (const [url, file] of shown) {
      if (!this.files.has(url)) this.files.set(url, this.#addFile(file));
    }
    this.media.hidden = !this.media.childElementCount;
    this.media.classList.toggle("skw-many", this.media.childElementCount > 1);
    for (const { link, name, verb } of this.files.values()) {
      setText(link, this.files.size > 1 ? `${verb} ${name}` : verb);
    }
  }

  #addFile(file) {
    const name = file.filename;
    const verb = file.isDownload ? t("Save") : t("Open");
    const how = file.isDownload ? { download: name } : { target: "_blank" };
    const link = make("a", "skw-button", { href: file.url, rel: "noopener", ...how });
    const about = file.isDownload ? t("Save {name}", { name }) : t("Open {name} in a new tab", { name });
    link.setAttribute("aria-label", about);
    this.links.append(link);
    const isShown = this.media.childElementCount < MAX_FIGURES;
    const figure = isShown ? makeFigure(file) : null;
    if (figure) this.media.append(figure);
    return { name, verb, link, figure };
  }

  #updateLog() {
    const lines = this.task.log;
    this.log.hidden = !lines.length;
    const count = lines.length;
    setText(this.logTitle, count === 1 ? t("Log (1 line)") : t("Log ({count} lines)", { count }));
    const box = this.logText;
    const isAtEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 4;
    setText(box, lines.join("\n"));
    if (isAtEnd) this.#scrollLog();
  }

  #scrollLog() {
    this.logText.scrollTop = this.logText.scrollHeight;
  }

  #updateButtons() {
    const can = possible(this.task);
    for (const [name, button] of Object.entries(this.buttons)) button.hidden = !can[name];
    this.links.hidden = !this.files.size;
    const isLoss = this.task.verdict === "succeeded" && !this.files.size;
    setText(this.buttons.erase.lastChild, isLoss ? t("Not downloaded! Delete?") : t("Really delete?"));
    this.actions.hidden = !this.files.size && !Object.values(can).some(Boolean);
  }

  say(text, isBad = false) {
    setLine(this.note, text);
    this.note.classList.toggle("skw-bad", isBad);
  }

  async #act(verb, done) {
    this.say("");
    try {
      this.update((await post(`tasks/${this.id}/${verb}`)).task);
      this.say(done);
    } catch (error) {
      this.say(error.message, true);
    }
  }

  #addNode() {
    try {
      addResultNode(this.task.taskid, this.element);
      this.say(t("Added to the graph: queue it to collect the files."));
    } catch (error) {
      this.say(error.message, true);
    }
  }

  /** Ask Wiro for the task's status; after errors less and less often. */
  async refresh() {
    try {
      this.update((await post(`tasks/${this.id}/refresh`)).task);
      if (this.failures) this.say("");
      this.failures = 0;
      return true;
    } catch (error) {
      this.failures += 1;
      this.pauses = Math.min(2 ** this.failures, 32);
      this.say(error.message, true);
      return false;
    }
  }
}

function makeFigure(file) {
  const element = makeMedia(file);
  if (!element) return null;
  const figure = make("figure", `skw-figure skw-${file.kind}`, {}, element);
  element.addEventListener("error", () => {
    figure.replaceChildren(make("span", "skw-faint", {}, t("Cannot show {name}", { name: file.filename })));
  });
  return figure;
}

function makeMedia({ kind, filename, url }) {
  if (kind === "image") return make("img", "", { alt: filename, src: url });
  if (kind === "other") return null;
  const player = make(kind, "", { "aria-label": filename, preload: "metadata" });
  Object.assign(player, { controls: true, src: url });
  if (kind === "video") Object.assign(player, { muted: true, loop: true, playsInline: true });
  return player;
}
