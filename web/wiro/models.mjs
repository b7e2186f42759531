// The button of Wiro Run Model and its dialog: find a model, fill in its form, see its price.
//
// All state is in the node's widgets, which the form writes, so a workflow works without the dialog.
import { app } from "../../../scripts/app.js";
import { actionButton, guard, make, setLine, setText } from "./dom.mjs";
import { mark, t } from "./language.mjs";
import {
  SOCKETS, applyExample, dropMember, examplesOf, factsOf, fieldsOf, groupsOf, isWiroPage,
  line, membersOf, placeOf, resetField, setPlace, shorten, shownIn, socketsFor, typeInto, unknownKeys,
} from "./schema.mjs";
import { get, post } from "./server.mjs";

const SEARCH_MS = 350;
const PRICE_MS = 600;
const MAX_OPTIONS = 2000;

const MODEL_LINKED = mark("The model is set by another node: change it there.");
const PARAMETERS_LINKED = mark("The node's parameters are set by another node: change it there.");
const ABOUT_FILES = mark(
  "Connect an image, video or audio to the node and choose here which parameter takes it, or type " +
  "the URL of a file (several: one per line).",
);
const ABOUT_URLS = mark("The files belong to somebody else.");

let dialog = null;

/** Add the button, which is in neither the saved workflow nor the prompt. */
export function addModelButton(node) {
  const open = guard(() => {
    dialog ??= new ModelDialog();
    dialog.open(node);
  });
  const button = node.addWidget("button", t("Choose model…"), null, open, { serialize: false });
  button.serialize = false;
}

class ModelDialog {
  constructor() {
    this.node = null;
    this.model = null;
    this.groups = [];
    this.controls = [];
    this.counters = { search: 0, model: 0, price: 0 };
    this.timers = {};
    this.#build();
  }

  #build() {
    this.search = make("input", "skw-input", {
      type: "search", placeholder: t("Search models"), "aria-label": t("Search models"),
      autocomplete: "off", spellcheck: "false", maxlength: "200",
    });
    this.search.addEventListener("input", () => this.#debounce("search", SEARCH_MS, () => this.#find()));
    this.found = make("p", "skw-faint", { role: "status" });
    this.list = make("ul", "skm-list", { "aria-label": t("Models") });
    this.form = make("div", "skm-form");
    this.close = actionButton(t("Close"), () => this.element.close());
    this.price = make("p", "skw-strong", { role: "status" });
    this.source = make("p", "skw-faint", {});
    this.problem = make("p", "skw-warning", {});
    const money = make("div", "skm-money", {}, this.price, this.source, this.problem);
    this.element = make(
      "dialog", "skw skm-dialog", { "aria-label": t("Wiro model") },
      make("div", "skm-left", {}, this.search, this.found, this.list),
      make("div", "skm-right", {}, this.form, make("div", "skm-foot", {}, money, this.close)),
    );
    // keys and clicks in the dialog must not reach the graph
    for (const name of ["keydown", "keyup", "keypress", "copy", "cut", "paste", "wheel"]) {
      this.element.addEventListener(name, (event) => event.stopPropagation());
    }
    this.element.addEventListener("pointerdown", (event) => {
      event.stopPropagation();
      if (event.target === this.element) this.element.close(); // outside of the dialog
    });
    this.element.addEventListener("close", guard(() => this.#onClose()));
    document.body.append(this.element);
  }

  open(node) {
    this.node = node;
    this.before = this.#state();
    this.search.value = "";
    this.element.showModal();
    this.#find();
    this.#load();
  }

  #onClose() {
    for (const timer of Object.values(this.timers)) clearTimeout(timer);
    for (const name of Object.keys(this.counters)) this.counters[name] += 1; // late answers are ignored
    const graph = this.node?.graph;
    if (graph && this.#state() !== this.before) {
      graph.beforeChange?.();
      graph.afterChange?.(); // one undo step for all changes
    }
    this.node = null;
    this.form.replaceChildren();
    this.list.replaceChildren();
  }

  // --- the node ---------------------------------------------------------------------------------

  #widget(name) {
    return this.node?.widgets?.find((widget) => widget.name === name);
  }

  #read(name) {
    return String(this.#widget(name)?.value ?? "");
  }

  #write(name, value) {
    const widget = this.#widget(name);
    if (!widget || widget.value === value) return;
    widget.value = value;
    widget.callback?.(value, app.canvas, this.node);
    app.canvas?.setDirty?.(true, true);
  }

  #state() {
    return JSON.stringify(["model", "parameters", "file_parameters"].map((name) => this.#read(name)));
  }

  #isLinked(name) {
    return (this.node?.inputs ?? []).some((input) => input.name === name && input.link != null);
  }

  // --- the list ---------------------------------------------------------------------------------

  #debounce(name, ms, work) {
    clearTimeout(this.timers[name]);
    this.timers[name] = setTimeout(guard(work), ms);
  }

  async #find() {
    const number = ++this.counters.search;
    setText(this.found, t("Asking Wiro…"));
    try {
      const path = `models?${new URLSearchParams({ search: this.search.value.trim() })}`;
      const { models } = await get(path);
      if (number !== this.counters.search) return;
      this.list.replaceChildren(...models.map((model) => this.#entry(model)));
      this.#markChosen();
      setText(this.found, models.length ? t("Found: {count}", { count: models.length }) : t("No model matches."));
    } catch (error) {
      if (number !== this.counters.search) return;
      this.list.replaceChildren();
      setText(this.found, error.message);
    }
  }

  #entry(model) {
    const button = make("button", "skm-entry", { type: "button" });
    button.skwSlug = model.slug;
    const words = make(
      "span", "skm-words", {},
      make("span", "skw-strong", {}, line(model.title) || model.slug),
      make("span", "skw-faint", {}, model.slug),
      make("span", "skw-faint skm-about", {}, shorten(model.about, 160)),
    );
    button.append(makePicture(model.image), words, make("span", "skm-price", {}, line(model.price)));
    button.addEventListener("click", guard(() => this.#choose(model.slug)));
    return make("li", "", {}, button);
  }

  #choose(slug) {
    if (this.#isLinked("model")) return this.#say(t(MODEL_LINKED));
    this.#write("model", slug);
    this.#markChosen();
    this.#load();
  }

  #markChosen() {
    const now = this.#read("model").toLowerCase();
    for (const button of this.list.querySelectorAll(".skm-entry")) {
      button.setAttribute("aria-pressed", String(button.skwSlug === now));
    }
  }

  // --- the form ---------------------------------------------------------------------------------

  #say(text) {
    this.form.replaceChildren(make("p", "skw-warning", { role: "status" }, text));
  }

  async #load() {
    const number = ++this.counters.model;
    const slug = this.#read("model").trim();
    this.controls = [];
    this.counters.price += 1;
    for (const element of [this.price, this.source, this.problem]) setLine(element, "");
    if (!slug) return this.#say(t("Choose a model on the left."));
    if (this.#isLinked("model")) return this.#say(t(MODEL_LINKED));
    this.#say(t("Asking Wiro about {slug}…", { slug }));
    try {
      const model = await get(`models/one?${new URLSearchParams({ slug })}`);
      if (number !== this.counters.model) return;
      this.model = model;
      this.groups = groupsOf(model);
      this.#show();
    } catch (error) {
      if (number === this.counters.model) this.#say(error.message);
    }
  }

  #show() {
    const { model, groups } = this;
    this.controls = [];
    const isFixed = this.#isLinked("parameters");
    const title = make("h3", "skm-title", {}, line(model.title) || model.slug);
    const head = make("div", "skm-head", {}, title, make("span", "skw-faint", {}, model.slug));
    if (isWiroPage(model.page)) {
      const link = { href: model.page, target: "_blank", rel: "noopener noreferrer" };
      head.append(make("a", "skw-faint", { ...link, referrerpolicy: "no-referrer" }, t("Page on Wiro")));
    }
    this.unknown = make("div", "skm-unknown");
    const parts = [head];
    if (model.about) parts.push(make("p", "skw-faint skm-about", {}, shorten(model.about, 600)));
    if (isFixed) parts.push(make("p", "skw-warning", {}, t(PARAMETERS_LINKED)));
    else parts.push(...this.#examples());
    for (const group of groups) parts.push(...this.#group(group));
    if (!groups.length) parts.push(make("p", "skw-faint", {}, t("The model lists no parameters.")));
    parts.push(this.unknown);
    parts.push(this.#jsonPart(isFixed));
    this.form.replaceChildren(...parts);
    this.form.scrollTop = 0;
    if (isFixed) for (const { lock } of this.controls) lock();
    this.#refresh();
  }

  #examples() {
    const examples = examplesOf(this.model, this.groups);
    if (!examples.length) return [];
    const rows = examples.map((example) => {
      const use = actionButton(t("Use"), () => this.#apply(example, false));
      const row = make("li", "skm-example", {}, make("span", "", {}, example.line), use);
      use.hidden = !example.entries.length;
      if (example.addresses.length) {
        const all = actionButton(t("Use with its files"), () => this.#apply(example, true));
        all.title = t(ABOUT_URLS);
        row.append(all);
      }
      return row;
    });
    const title = make("summary", "", {}, t("Examples ({count})", { count: examples.length }));
    return [make("details", "skm-examples", {}, title, make("ul", "", {}, ...rows))];
  }

  #apply(example, withUrls) {
    this.#write("parameters", applyExample(this.#read("parameters"), example, withUrls));
    this.#refresh();
  }

  #group({ title, fields }) {
    const rows = (some) => make("div", "skm-fields", {}, ...some.map((field) => this.#field(field)));
    const [usual, advanced] = [fields.filter((f) => !f.isAdvanced), fields.filter((f) => f.isAdvanced)];
    const parts = [];
    if (title) parts.push(make("h4", "skm-group", {}, title));
    if (usual.length) parts.push(rows(usual));
    if (advanced.length) {
      const name = make("summary", "", {}, t("Advanced ({count})", { count: advanced.length }));
      parts.push(make("details", "", {}, name, rows(advanced)));
    }
    return parts;
  }

  #field(field) {
    const control = makeControl(field);
    const problem = make("p", "skw-warning", {});
    const reset = actionButton(t("Reset"), () => {
      this.#write("parameters", resetField(this.#read("parameters"), field));
      this.#refresh();
    });
    control.id = `skm-field-${this.controls.length}`;
    const label = make("label", "skm-label", { for: control.id }, field.label);
    if (field.isRequired) label.append(make("span", "skm-required", { title: t("required") }, " *"));
    const facts = make("span", "skw-faint", {}, factsOf(field));
    const element = make(
      "div", "skm-field", {}, make("div", "skm-facts", {}, label, facts, reset), control,
    );
    const sockets = field.kind === "file" ? this.#sockets(field) : null;
    if (sockets) element.append(sockets.element);
    if (field.help) element.append(make("p", "skw-faint skm-help", {}, field.help));
    element.append(problem);
    control.addEventListener(
      "input",
      guard(() => {
        const answer = typeInto(this.#read("parameters"), field, control.value);
        this.#write("parameters", answer.json);
        setLine(problem, answer.problem);
        this.#refresh(control);
      }),
    );
    setLine(problem, "");
    this.controls.push({
      lock: () => (control.disabled = reset.disabled = true),
      update: (json, typing) => {
        const now = shownIn(json, field);
        reset.hidden = !now.isGiven;
        if (control === typing) return;
        control.value = now.text;
        if (control.tagName === "SELECT" && control.value !== now.text) {
          addOption(control, now.text); // a value that is not among the model's options
          control.value = now.text;
        }
        control.readOnly = now.isOdd;
        setLine(problem, now.isOdd ? t("This value is not a plain one: edit it in the JSON below.") : "");
        sockets?.update();
      },
    });
    return element;
  }

  /** Buttons that assign the node's inputs to this parameter. */
  #sockets(field) {
    const buttons = socketsFor(field).map((socket) => {
      const button = actionButton(socket, () => {
        const places = this.#read("file_parameters");
        const name = placeOf(places, socket) === field.id ? "" : field.id;
        this.#write("file_parameters", setPlace(places, socket, name));
        this.#refresh();
      });
      return { socket, button };
    });
    const element = make(
      "div", "skm-sockets", {},
      make("span", "skw-faint", { title: t(ABOUT_FILES) }, t("From input")),
      ...buttons.map(({ button }) => button),
    );
    const isFixed = this.#isLinked("file_parameters");
    const update = () => {
      for (const { socket, button } of buttons) {
        const place = this.#placeOf(socket);
        button.setAttribute("aria-pressed", String(place === field.id));
        button.disabled = isFixed;
        const isConnected = this.#isLinked(socket);
        button.classList.toggle("skm-off", !isConnected);
        button.title = isConnected
          ? t("Send the node's {socket} to this parameter", { socket })
          : t("{socket} is not connected.", { socket });
      }
    };
    return { element, update };
  }

  #placeOf(socket) {
    const named = placeOf(this.#read("file_parameters"), socket);
    return named || socket !== "image" ? named : this.#read("image_parameter").trim();
  }

  #jsonPart(isFixed) {
    const box = make("textarea", "skw-input skm-json", { rows: "8", spellcheck: "false", "aria-label": "JSON" });
    const note = make("p", "skw-warning", {});
    box.readOnly = isFixed;
    box.addEventListener(
      "input",
      guard(() => {
        this.#write("parameters", box.value);
        this.#refresh(box);
      }),
    );
    this.controls.push({
      lock: () => {},
      update: (json, typing) => {
        if (box !== typing) box.value = json;
        setLine(note, membersOf(json).problem);
      },
    });
    return make("details", "skm-jsonbox", {}, make("summary", "", {}, "JSON"), box, note);
  }

  /** Update everything that depends on the JSON, except the control `typing`. */
  #refresh(typing = null) {
    const json = this.#read("parameters");
    for (const { update } of this.controls) update(json, typing);
    this.#showUnknown(json);
    this.#debounce("price", PRICE_MS, () => this.#askPrice());
  }

  #showUnknown(json) {
    const keys = this.groups.length ? unknownKeys(json, this.groups) : [];
    const takers = fieldsOf(this.groups).filter(({ kind }) => kind === "file").map(({ id }) => id);
    const places = this.#read("file_parameters");
    const lost = takers.length
      ? SOCKETS.filter((socket) => placeOf(places, socket) && !takers.includes(placeOf(places, socket)))
      : [];
    if (!keys.length && !lost.length) return this.unknown.replaceChildren();
    const names = [...keys, ...lost.map((socket) => t("{name} (for {socket})", { name: placeOf(places, socket), socket }))];
    const text = t("Not parameters of this model: {names}. Remove them to run it.", {
      names: shorten(names.join(", "), 300),
    });
    const remove = actionButton(t("Remove"), () => {
      this.#write("parameters", keys.reduce(dropMember, this.#read("parameters")));
      const left = lost.reduce((rest, socket) => setPlace(rest, socket, ""), places);
      this.#write("file_parameters", left);
      this.#refresh();
    });
    remove.disabled = this.#isLinked("parameters") || this.#isLinked("file_parameters");
    this.unknown.replaceChildren(make("p", "skw-warning", {}, text), remove);
  }

  async #askPrice() {
    const number = ++this.counters.price;
    const json = this.#read("parameters");
    if (!this.node || !this.model || !membersOf(json).members) return;
    const files = SOCKETS.filter((socket) => this.#isLinked(socket)).length;
    try {
      const parameters = json.trim() ? JSON.parse(json) : {};
      const answer = await post("models/price", { slug: this.model.slug, parameters, files });
      if (number !== this.counters.price) return;
      setLine(this.price, answer.price ? t("Price {price}", { price: answer.price }) : t("Price not published"));
      const limits = answer.limits[0].toUpperCase() + answer.limits.slice(1);
      setLine(this.source, `${answer.source} ${limits}.`);
      setLine(this.problem, answer.problem);
    } catch (error) {
      if (number !== this.counters.price) return;
      setLine(this.price, t("Price unknown"));
      setLine(this.source, error.message);
      setLine(this.problem, "");
    }
  }
}

function makeControl(field) {
  if (field.kind === "long") {
    return make("textarea", "skw-input", { rows: "3", placeholder: field.placeholder || String(field.initial) });
  }
  if (field.kind === "file") {
    const rows = { rows: field.takesMany ? "2" : "1", spellcheck: "false" };
    return make("textarea", "skw-input", { ...rows, placeholder: t("URL of a file") });
  }
  if (field.kind === "choice" || field.kind === "flag") return makeSelect(field);
  const mode = field.kind === "number" ? { inputmode: "decimal" } : {};
  const hint = field.placeholder || String(field.initial);
  return make("input", "skw-input", { type: "text", autocomplete: "off", ...mode, placeholder: hint });
}

function makeSelect(field) {
  const select = make("select", "skw-input");
  const options =
    field.kind === "flag" ? ["true", "false"].map((value) => ({ value, label: value })) : field.options;
  const initial = options.find(({ value }) => value === field.initial)?.label ?? field.initial;
  addOption(select, "", initial ? t("default ({value})", { value: shorten(initial, 60) }) : t("not set"));
  for (const { value, label } of options.slice(0, MAX_OPTIONS)) addOption(select, value, label);
  return select;
}

function addOption(select, value, label = value) {
  select.append(make("option", "", { value }, shorten(label, 100)));
}

/** Loaded lazily, and without a referrer. */
function makePicture(address) {
  const frame = make("span", "skm-picture", { "aria-hidden": "true" });
  if (typeof address !== "string" || !address) return frame;
  const picture = make("img", "", { referrerpolicy: "no-referrer", loading: "lazy", alt: "" });
  picture.addEventListener("error", () => picture.remove());
  picture.src = address;
  frame.append(picture);
  return frame;
}
