// The list of remote tasks in the sidebar.
import { createAccountForm, loadAccount, mayHaveKey, subscribeAccount } from "./account.mjs";
import { actionButton, complain, make, setLine, setText } from "./dom.mjs";
import { mark, t } from "./language.mjs";
import { TaskRow } from "./row.mjs";
import { get, ServerError } from "./server.mjs";
import { csvName, FILTERS, isFiltering, NO_FILTER, select, toCsv } from "./table.mjs";
import { accountNotes, keyLine, limitLine, needsAsking, spentLine } from "./words.mjs";

const SHOWN = 50; // rows at first, and added by "Show more"
const PAGE_SIZE = 500; // older tasks of one request
const MAX_SEARCHED = 10000; // tasks that a search loads
const TICK_MS = 1000;
const POLL_MS = 10000;
const MAX_REFRESHED = 20; // tasks of one poll
const SPENT_DELAY_MS = 1500; // the server books a task's cost shortly after its end
const MAX_PAUSE = 30; // polls, while the server does not answer

const BALANCE = mark("Your balance is shown on wiro.ai only; Wiro starts nothing below $0.50.");
const OFFLINE = mark("Cannot reach the ComfyUI server. The list updates when it is back.");
const EMPTY = [
  mark("No remote tasks yet."),
  mark(
    "Add the node Wiro Remote I2V: double-click the canvas and type “wiro”. Once queued, its " +
    "progress, cost and files appear here.",
  ),
];

export function createPanel() {
  return new Panel();
}

class Panel {
  constructor() {
    this.tasks = new Map(); // row number -> task, all that are loaded
    this.eventAt = new Map(); // row number -> counter at the task's last event
    this.rows = new Map(); // row number -> TaskRow, those on the page
    this.filter = NO_FILTER;
    this.shown = SHOWN;
    this.hasOlder = false;
    this.loadingOlder = null;
    this.wanted = 0; // how many tasks to load
    this.counter = 0; // orders events and requests
    this.timers = [];
    this.spentTimer = 0;
    this.loading = null;
    this.isPolling = false;
    this.isOffline = false;
    this.pauses = 0;
    this.lastPause = 0;
    this.account = null;
    this.problem = "";
    this.#build();
    subscribeAccount((account) => {
      this.account = account;
      this.#updateTop();
    });
  }

  #build() {
    this.form = createAccountForm();
    this.key = make("span", "skw-key", {}, "…");
    this.setKey = actionButton(t("Set key"), () => this.#openForm("focus"));
    this.setKey.hidden = true;
    const refresh = actionButton("", () => this.reload());
    refresh.append(make("i", "pi pi-refresh", { "aria-hidden": "true" }));
    refresh.title = t("Refresh");
    refresh.setAttribute("aria-label", refresh.title);
    this.money = make("p", "skw-money skw-faint", { role: "status" }, "\u00a0");
    this.limit = make("span", "skw-faint", {}, "\u00a0");
    this.setLimit = actionButton(t("Change"), () => this.#openForm("focusLimits"));
    this.setLimit.setAttribute("aria-label", t("Change the spending limits"));
    this.setLimit.hidden = true;
    this.notes = make("p", "skw-faint", {});
    this.notes.hidden = true;
    const title = make("summary", "", {}, t("Account and limits"));
    this.accountBox = make("details", "skw-account", {}, title, this.form.element);
    this.list = make("ul", "skw-list", { "aria-label": t("Remote tasks") });
    this.empty = make("div", "skw-empty", {}, ...EMPTY.map((text) => make("p", "", {}, t(text))));
    this.empty.hidden = true;
    this.#buildSearch();
    this.spoken = make("div", "skw-spoken", { role: "status" });
    this.element = make(
      "section", "skw skw-panel", { "aria-label": t("Wiro remote tasks") },
      make("div", "skw-top", {}, this.key, this.setKey, refresh),
      this.money, make("div", "skw-limit", {}, this.limit, this.setLimit),
      make("p", "skw-faint", {}, t(BALANCE)), this.notes,
      this.accountBox, this.search, this.spoken, this.empty, this.list, this.more,
    );
  }

  #buildSearch() {
    const field = (tag, attributes, ...children) =>
      make(tag, "skw-input", { autocomplete: "off", ...attributes }, ...children);
    const options = FILTERS.map(([value, text]) => make("option", "", { value }, t(text)));
    this.fields = {
      text: field("input", {
        type: "search", placeholder: t("model, task id or error"), "aria-label": t("Search tasks"),
        maxlength: "200",
      }),
      group: field("select", { "aria-label": t("State") }, ...options),
      from: field("input", { type: "date", "aria-label": t("From day"), title: t("From") }),
      to: field("input", { type: "date", "aria-label": t("To day"), title: t("To") }),
    };
    const change = () => this.#setFilter();
    for (const input of Object.values(this.fields)) input.addEventListener("input", change);
    const { text, group, from, to } = this.fields;
    this.count = make("span", "skw-faint", { role: "status" });
    this.exporter = actionButton(t("Export as CSV"), () => this.#export());
    this.search = make(
      "section", "skw-search", { "aria-label": t("Search and export"), role: "search" },
      text, group,
      make("div", "skw-days", {}, from, make("span", "skw-faint", {}, t("to")), to),
      make("div", "skw-found", {}, this.count, this.exporter),
    );
    this.more = actionButton(t("Show more"), () => this.#showMore());
    this.more.classList.add("skw-more");
    this.more.hidden = true;
  }

  #setFilter() {
    const values = Object.entries(this.fields).map(([name, input]) => [name, input.value]);
    this.filter = Object.fromEntries(values);
    this.shown = SHOWN;
    this.#render();
    if (isFiltering(this.filter)) this.#loadOlder(MAX_SEARCHED).catch(complain);
  }

  async #showMore() {
    this.shown += SHOWN;
    if (select(this.tasks.values(), this.filter).length < this.shown) {
      await this.#loadOlder(this.tasks.size + PAGE_SIZE);
    }
    this.#render();
  }

  /** Load older tasks until so many are loaded or there are no more; shared by all callers. */
  #loadOlder(wanted) {
    this.wanted = Math.max(this.wanted, wanted); // a running load continues that far
    this.loadingOlder ??= this.#fetchOlder().finally(() => (this.loadingOlder = null));
    return this.loadingOlder;
  }

  async #fetchOlder() {
    while (this.hasOlder && this.tasks.size < this.wanted) {
      const oldest = Math.min(...this.tasks.keys());
      let answer;
      try {
        answer = await get(`tasks?limit=${PAGE_SIZE}&before=${oldest}`);
      } catch (error) {
        this.problem = error.message;
        this.#updateTop();
        return;
      }
      for (const task of answer.tasks) if (task.id < oldest) this.tasks.set(task.id, task);
      this.hasOlder = answer.has_more && answer.tasks.length > 0;
      this.#render();
    }
  }

  #export() {
    const tasks = select(this.tasks.values(), this.filter);
    const url = URL.createObjectURL(new Blob([toCsv(tasks)], { type: "text/csv;charset=utf-8" }));
    const link = make("a", "", { href: url, download: csvName(Date.now() / 1000) });
    this.element.append(link); // some browsers click only links in the document
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  }

  mount(container) {
    if (this.element.parentNode === container) return;
    container.classList.add("skw-container");
    container.replaceChildren(this.element);
    this.#stopTimers();
    this.timers = [
      setInterval(() => this.#tick(), TICK_MS),
      setInterval(() => this.#poll().catch(complain), POLL_MS),
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

  get #isVisible() {
    return this.element.isConnected && document.visibilityState === "visible";
  }

  /** An event of the server: newer than anything loaded. */
  onTask(task) {
    this.#store(task);
    this.eventAt.set(task.id, ++this.counter);
    this.#render();
  }

  /** The socket is gone: say so until it is back. */
  onDisconnect() {
    this.#setOffline(true);
    this.pauses = MAX_PAUSE;
  }

  /** The socket is back: events may have been missed. */
  onReconnect() {
    if (this.element.isConnected) this.reload(); // else opening the panel loads it
  }

  /** Load the list and the account again; shared by all callers. */
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
      this.problem = answer.error;
      this.#storeList(answer.tasks, answer.has_more, began);
      await loadAccount();
    } catch (error) {
      if (!(error instanceof ServerError)) complain(error);
      if (error.isOffline) this.#setOffline(true);
      this.problem = error.message;
    }
    this.#updateTop();
  }

  #storeList(tasks, hasMore, began) {
    const listed = new Set(tasks.map((task) => task.id));
    const oldest = hasMore ? Math.min(...listed) : 0; // the answer does not cover older ones
    for (const id of [...this.tasks.keys()]) {
      if (id >= oldest && !listed.has(id) && !(this.eventAt.get(id) > began)) this.tasks.delete(id);
    }
    const isFirst = ![...this.tasks.keys()].some((id) => id < oldest);
    if (isFirst) this.hasOlder = hasMore;
    for (const task of tasks) {
      // an event after the request is newer than its answer
      if (!(this.eventAt.get(task.id) > began)) this.#store(task);
    }
    this.#render();
  }

  #store(task) {
    this.tasks.set(task.id, task);
    const row = this.rows.get(task.id);
    if (row) this.#update(row, task);
  }

  #update(row, task) {
    const wasActive = row.state.isActive;
    row.update(task);
    if (wasActive && !row.state.isActive) this.#announceEnd(row);
  }

  /** Show the tasks that match the filter, as many as are to be shown. */
  #render() {
    const found = select(this.tasks.values(), this.filter);
    const shown = new Map(found.slice(0, this.shown).map((task) => [task.id, task]));
    for (const row of [...this.rows.values()]) if (!shown.has(row.id)) this.#remove(row);
    for (const task of shown.values()) if (!this.rows.has(task.id)) this.#add(task);
    const isSearch = isFiltering(this.filter);
    const left = found.length - shown.size;
    this.more.hidden = !left && !this.hasOlder;
    this.search.hidden = !this.tasks.size;
    const older = this.hasOlder ? "+" : "";
    const total = `${this.tasks.size}${older}`;
    setText(this.count, this.#countLine(found.length, isSearch, total));
    setText(this.exporter, t("Export {count} as CSV", { count: found.length }));
    this.exporter.disabled = !found.length;
    this.empty.hidden = this.tasks.size > 0;
  }

  #countLine(count, isSearch, total) {
    const isOne = this.tasks.size === 1;
    const values = { count, total };
    if (!isSearch) return isOne ? t("{total} task", values) : t("{total} tasks", values);
    return isOne ? t("{count} of {total} task", values) : t("{count} of {total} tasks", values);
  }

  // existing rows never move: moving a video restarts it
  #add(task) {
    const row = new TaskRow(task);
    row.onUpdate = (now) => this.tasks.set(now.id, now);
    const older = [...this.list.children].find((element) => element.skwId < task.id);
    row.element.skwId = task.id;
    this.list.insertBefore(row.element, older ?? null);
    this.rows.set(task.id, row);
  }

  #remove(row) {
    row.element.remove();
    this.rows.delete(row.id);
  }

  #announceEnd(row) {
    setText(this.spoken, t("Task {id}: {state}", { id: row.task.taskid, state: t(row.state.word) }));
    clearTimeout(this.spentTimer);
    const update = () => loadAccount().catch(() => {}); // the next poll shows the amount too
    if (this.element.isConnected) this.spentTimer = setTimeout(update, SPENT_DELAY_MS);
  }

  #tick() {
    if (!this.#isVisible) return;
    for (const row of this.rows.values()) if (row.state.isActive) row.tick();
  }

  /** Load tasks that other pages have queued, and refresh those that no node follows. */
  async #poll() {
    if (this.isPolling || !this.#isVisible) return;
    if (this.isOffline) return this.#retry();
    this.isPolling = true;
    try {
      await this.reload(); // a page gets the events of its own tasks only
      if (!mayHaveKey() || this.isOffline) return;
      for (const row of this.#rowsToRefresh()) {
        const wasActive = row.state.isActive;
        if (!(await row.refresh())) break; // one error per poll is enough
        if (wasActive && !row.state.isActive) this.#announceEnd(row);
      }
    } finally {
      this.isPolling = false;
    }
  }

  #rowsToRefresh() {
    const rows = [...this.rows.values()].filter((row) => needsAsking(row.task));
    return rows.filter((row) => row.pauses-- <= 0).slice(0, MAX_REFRESHED);
  }

  // the browser logs every unanswered request: retry less and less often
  #retry() {
    if (this.pauses-- > 0) return;
    this.lastPause = Math.min(this.lastPause * 2 + 1, MAX_PAUSE);
    this.pauses = this.lastPause;
    return this.reload();
  }

  #setOffline(isOffline) {
    if (!isOffline) this.pauses = this.lastPause = 0;
    this.isOffline = isOffline;
    this.#updateTop();
  }

  // a problem replaces the amounts, so that nothing below moves
  #updateTop() {
    const { account } = this;
    const problem = this.isOffline ? t(OFFLINE) : this.problem;
    if (account) {
      const { text, verb } = limitLine(account);
      setText(this.key, keyLine(account));
      setText(this.limit, text);
      this.setLimit.hidden = !verb;
      setLine(this.notes, accountNotes(account).join(" "));
    }
    this.setKey.hidden = !account || account.has_key;
    setText(this.money, problem || (account ? spentLine(account) : "\u00a0"));
    this.money.classList.toggle("skw-bad", Boolean(problem));
  }

  #openForm(where) {
    this.accountBox.open = true;
    this.form[where]();
  }
}
