// The list of remote tasks in the sidebar.
import { createAccountForm, followAccount, loadAccount, mayHaveKey } from "./account.mjs";
import { actionButton, complain, make, setLine, setText } from "./dom.mjs";
import { TaskRow } from "./row.mjs";
import { get, ServerError } from "./server.mjs";
import { accountNotes, keyLine, limitLine, needsAsking, spentLine } from "./words.mjs";

const SHOWN = 50;
const TICK_MS = 1000;
const ASK_MS = 10000;
const ASKED_AT_ONCE = 20;
const SPENT_AFTER_MS = 1500; // a task's end is booked before its cost is asked for
const LONGEST_PAUSE = 30; // rounds, while the server does not answer

const OFFLINE = "The server is not reachable. The list goes on when it is back.";
const EMPTY = [
  "No remote tasks yet.",
  "Add the node Wiro Remote I2V: double-click the canvas and type “wiro”. Once it is queued, " +
    "its progress, cost and files appear here.",
];

export function createPanel() {
  return new Panel();
}

class Panel {
  constructor() {
    this.rows = new Map();
    this.counter = 0; // orders events and questions
    this.timers = [];
    this.spentTimer = 0;
    this.loading = null;
    this.isAsking = false;
    this.isOffline = false;
    this.pauses = 0;
    this.lastPause = 0;
    this.account = null;
    this.trouble = "";
    this.#build();
    followAccount((account) => {
      this.account = account;
      this.#updateTop();
    });
  }

  #build() {
    this.form = createAccountForm();
    this.key = make("span", "skw-key", {}, "…");
    this.setKey = actionButton("set it here", () => this.#openForm("focus"));
    this.setKey.hidden = true;
    const refresh = actionButton("", () => this.reload());
    refresh.append(make("i", "pi pi-refresh", { "aria-hidden": "true" }));
    refresh.setAttribute("aria-label", "Refresh");
    refresh.title = "Refresh";
    this.money = make("p", "skw-money skw-faint", { role: "status" }, "\u00a0");
    this.limit = make("span", "skw-faint", {}, "\u00a0");
    this.setLimit = actionButton("change", () => this.#openForm("focusLimits"));
    this.setLimit.setAttribute("aria-label", "Change the spending limits");
    this.setLimit.hidden = true;
    this.notes = make("p", "skw-faint", {});
    this.notes.hidden = true;
    const title = make("summary", "", {}, "Account and limits");
    this.accountBox = make("details", "skw-account", {}, title, this.form.element);
    this.list = make("ul", "skw-list", { "aria-label": "Remote tasks" });
    this.empty = make("div", "skw-empty", {}, ...EMPTY.map((text) => make("p", "", {}, text)));
    this.empty.hidden = true;
    this.spoken = make("div", "skw-spoken", { role: "status" });
    this.element = make(
      "section", "skw skw-panel", { "aria-label": "Wiro remote tasks" },
      make("div", "skw-top", {}, this.key, this.setKey, refresh),
      this.money, make("div", "skw-limit", {}, this.limit, this.setLimit), this.notes,
      this.accountBox, this.spoken, this.empty, this.list,
    );
  }

  mount(container) {
    if (this.element.parentNode === container) return;
    container.classList.add("skw-container");
    container.replaceChildren(this.element);
    this.#stopTimers();
    this.timers = [
      setInterval(() => this.#tick(), TICK_MS),
      setInterval(() => this.#ask().catch(complain), ASK_MS),
    ];
    this.reload();
  }

  unmount() {
    this.#stopTimers();
    this.form.clear();
    for (const video of this.list.querySelectorAll("video")) video.pause();
    this.element.remove();
  }

  #stopTimers() {
    this.timers.forEach(clearInterval);
    this.timers = [];
  }

  get #isSeen() {
    return this.element.isConnected && document.visibilityState === "visible";
  }

  /** An event of the server: always newer than what is known. */
  hear(task) {
    const row = this.#put(task);
    row.heardAt = ++this.counter;
    this.#updateEmpty();
  }

  /** The socket is gone: the page says so until it is back. */
  lose() {
    this.#setOffline(true);
    this.pauses = LONGEST_PAUSE;
  }

  /** The socket is back: events may have been missed. */
  regain() {
    if (this.element.isConnected) this.reload(); // else it is loaded when it is opened
  }

  /** The list and the account anew; one at a time. */
  reload() {
    this.loading ??= this.#load()
      .catch(complain)
      .finally(() => (this.loading = null));
    return this.loading;
  }

  async #load() {
    const began = ++this.counter;
    try {
      const answer = await get(`tasks?limit=${SHOWN}`);
      this.#setOffline(false);
      this.trouble = answer.error;
      this.#takeList(answer.tasks, began);
      await loadAccount();
    } catch (error) {
      if (!(error instanceof ServerError)) complain(error);
      if (error.isOffline) this.#setOffline(true);
      this.trouble = error.message;
    }
    this.#updateTop();
  }

  #takeList(tasks, began) {
    const listed = new Set(tasks.map((task) => task.id));
    for (const row of [...this.rows.values()]) {
      if (!listed.has(row.id) && row.heardAt < began) this.#drop(row);
    }
    for (const task of tasks) {
      // an event that came after the question is newer than the answer
      if (!(this.rows.get(task.id)?.heardAt > began)) this.#put(task);
    }
    this.#updateEmpty();
  }

  #put(task) {
    const row = this.rows.get(task.id);
    if (!row) return this.#add(task);
    const wasActive = row.state.isActive;
    row.update(task);
    if (wasActive && !row.state.isActive) this.#announceEnd(row);
    return row;
  }

  // rows that are there never move: a video that is moved starts again
  #add(task) {
    const row = new TaskRow(task);
    const older = [...this.list.children].find((element) => element.skwId < task.id);
    row.element.skwId = task.id;
    this.list.insertBefore(row.element, older ?? null);
    this.rows.set(task.id, row);
    return row;
  }

  #drop(row) {
    row.element.remove();
    this.rows.delete(row.id);
  }

  #announceEnd(row) {
    setText(this.spoken, `Task ${row.task.taskid}: ${row.state.word}`);
    clearTimeout(this.spentTimer);
    const ask = () => loadAccount().catch(() => {}); // the amount is news, not worth an error
    if (this.element.isConnected) this.spentTimer = setTimeout(ask, SPENT_AFTER_MS);
  }

  #tick() {
    if (!this.#isSeen) return;
    for (const row of this.rows.values()) if (row.state.isActive) row.tick();
  }

  /** Look for tasks that other pages have queued, and ask about those nobody follows. */
  async #ask() {
    if (this.isAsking || !this.#isSeen) return;
    if (this.isOffline) return this.#knock();
    this.isAsking = true;
    try {
      await this.reload(); // a page is sent the events of what it queued itself, and no others
      if (!mayHaveKey() || this.isOffline) return;
      for (const row of this.#rowsToAsk()) {
        const wasActive = row.state.isActive;
        if (!(await row.refresh())) break; // one error a round is enough
        if (wasActive && !row.state.isActive) this.#announceEnd(row);
      }
    } finally {
      this.isAsking = false;
    }
  }

  #rowsToAsk() {
    const rows = [...this.rows.values()].filter((row) => needsAsking(row.task));
    return rows.filter((row) => row.pauses-- <= 0).slice(0, ASKED_AT_ONCE);
  }

  // the browser logs every request nobody answers: knock less and less often
  #knock() {
    if (this.pauses-- > 0) return;
    this.lastPause = Math.min(this.lastPause * 2 + 1, LONGEST_PAUSE);
    this.pauses = this.lastPause;
    return this.reload();
  }

  #setOffline(isOffline) {
    if (!isOffline) this.pauses = this.lastPause = 0;
    this.isOffline = isOffline;
    this.#updateTop();
  }

  // trouble takes the place of the amounts, so that nothing below it moves
  #updateTop() {
    const { account } = this;
    const trouble = this.isOffline ? OFFLINE : this.trouble;
    if (account) {
      const { text, verb } = limitLine(account);
      setText(this.key, keyLine(account));
      setText(this.limit, text);
      this.setLimit.hidden = !verb;
      setLine(this.notes, accountNotes(account).join(" "));
    }
    this.setKey.hidden = !account || account.has_key;
    setText(this.money, trouble || (account ? spentLine(account) : "\u00a0"));
    this.money.classList.toggle("skw-bad", Boolean(trouble));
  }

  #updateEmpty() {
    this.empty.hidden = this.rows.size > 0;
  }

  #openForm(where) {
    this.accountBox.open = true;
    this.form[where]();
  }
}
