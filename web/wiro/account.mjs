// The account: a store that both forms (panel and settings) subscribe to, and the form itself.
import { actionButton, confirmButton, complain, make, setLine, setText } from "./dom.mjs";
import { mark, t } from "./language.mjs";
import { get, post } from "./server.mjs";
import { accountNotes, keyLine, usable } from "./words.mjs";

const LIMITS = [
  ["per_run", mark("Per run")],
  ["per_day", mark("Per day")],
  ["per_month", mark("Per month")],
];
const ABOUT_DEFAULT = mark(
  "These are defaults until you save your own limits; until then, models without a published " +
  "price do not run. Leave a field empty for no limit.",
);
const BAD_LIMIT = mark("Type a limit in US dollars, such as 0.50, or leave it empty for no limit.");
const ABOUT_KEY = mark(
  "The key is stored in a file on the ComfyUI server, never in a workflow or in this browser. " +
  "WIRO_API_KEY and WIRO_API_SECRET in the server's environment take precedence.",
);
const ABOUT_PROOF = mark(
  "Required to replace or remove the key, and to raise or remove a limit. Lowering a limit does " +
  "not require it.",
);
const COLLECT = mark("Collect unfinished tasks when ComfyUI starts");
const ABOUT_COLLECT = mark(
  "Tasks that were still running when ComfyUI closed are followed and their files downloaded, " +
  "four at a time. This costs nothing.",
);
const PLAIN_HTTP = mark(
  "This page is not encrypted: others on the network could read a key typed here. Set the key " +
  "in the server's environment instead.",
);

const listeners = new Set();
let account = null;

/** Call `listener` now if the account is known, and whenever it changes. */
export function subscribeAccount(listener) {
  listeners.add(listener);
  if (account) listener(account);
}

export async function loadAccount() {
  publish(await get("account"));
}

/** False only if the server said so. */
export function mayHaveKey() {
  return account?.has_key !== false;
}

function publish(answer) {
  account = answer;
  for (const listener of listeners) {
    try {
      listener(account);
    } catch (error) {
      complain(error);
    }
  }
}

/** The account's form: {element, refresh, clear, focus, focusLimits}. */
export function createAccountForm() {
  const proof = createProofPart();
  const key = createKeyPart(proof);
  const limits = createLimitsPart(proof);
  const collect = createCollectPart();
  const notes = make("p", "skw-warning");
  subscribeAccount((now) => setLine(notes, accountNotes(now).join(" ")));
  const clear = () => {
    key.clear();
    proof.clear();
  };
  return {
    element: make("div", "skw skw-form", {}, notes, key.element, limits.element, proof.element,
      collect.element),
    focus: key.focus,
    focusLimits: limits.focus,
    clear,
    refresh() {
      clear();
      loadAccount().catch((error) => key.say(error.message, true));
    },
  };
}

/** The last characters of the key in use, sent along by the two other parts. */
function createProofPart() {
  const input = secretInput();
  const element = make(
    "section", "skw-part", { "aria-label": t("Proof") },
    make("label", "skw-field", {}, t("Last 4 characters of the key in use"), input),
    make("p", "skw-faint", {}, t(ABOUT_PROOF)),
  );
  subscribeAccount((now) => (element.hidden = !usable(now).proof));
  return {
    element,
    clear: () => (input.value = ""),
    /** Post with the proof; if the server rejects it, focus its field. */
    async post(path, body) {
      try {
        const answer = await post(path, { ...body, proof: input.value.trim().slice(-4) });
        input.value = "";
        return answer;
      } catch (error) {
        if (error.status === 403 && !element.hidden) input.focus();
        throw error;
      }
    },
  };
}

function createKeyPart(proof) {
  const status = make("p", "skw-strong", {}, "…");
  const problem = make("p", "skw-warning", {});
  const [key, secret] = [secretInput(), secretInput()];
  const result = resultLine();
  const clear = () => [key, secret].forEach((input) => (input.value = ""));
  const store = async (text, api_key, api_secret) => {
    publish(await proof.post("account", { api_key, api_secret }));
    clear();
    result.say(text);
  };
  const save = result.wrap(async () => {
    if (!key.value.trim()) return result.say(t("Type the API key first."), true);
    await store(t("Saved."), key.value.trim(), secret.value.trim());
  });
  const remove = result.wrap(() => store(t("The stored key was removed."), "", ""));
  const test = result.wrap(async () => {
    result.say(t("Asking Wiro…"));
    result.say((await post("account/test")).message);
  });
  const buttons = {
    save: actionButton(t("Save key"), save),
    test: actionButton(t("Test connection"), test),
    remove: confirmButton(t("Remove key"), t("Really remove?"), remove),
  };
  for (const input of [key, secret]) onEnter(input, buttons.save);
  subscribeAccount((now) => {
    const can = usable(now);
    setText(status, keyLine(now));
    setLine(problem, now.problem ?? "");
    for (const control of [key, secret, buttons.save]) control.disabled = !can.key;
    buttons.remove.disabled = !can.remove;
    buttons.test.disabled = !can.test;
  });
  const element = make(
    "section", "skw-part", { "aria-label": t("Wiro key") },
    status,
    problem,
    make("label", "skw-field", {}, t("API key"), key),
    make("label", "skw-field", {}, t("API secret (if the project has one)"), secret),
    make("div", "skw-buttons", {}, ...Object.values(buttons)),
    result.element,
    make("p", "skw-faint", {}, t(ABOUT_KEY)),
  );
  if (!window.isSecureContext) element.append(make("p", "skw-warning", {}, t(PLAIN_HTTP)));
  return { element, clear, say: result.say, focus: () => key.focus() };
}

function createLimitsPart(proof) {
  const inputs = Object.fromEntries(LIMITS.map(([name]) => [name, limitInput()]));
  const edited = new Set(); // an answer does not overwrite what is being typed
  const result = resultLine();
  const save = result.wrap(async () => {
    const limits = {};
    for (const [name, input] of Object.entries(inputs)) {
      const amount = input.value.trim().replace(",", ".");
      if (!/^(\d{1,9}(\.\d{1,9})?)?$/.test(amount)) {
        input.focus();
        return result.say(t(BAD_LIMIT), true);
      }
      limits[name] = amount || null;
    }
    const answer = await proof.post("limits", limits);
    edited.clear();
    publish(answer);
    result.say(t("Saved."));
  });
  const button = actionButton(t("Save limits"), save);
  for (const [name, input] of Object.entries(inputs)) {
    input.addEventListener("input", () => edited.add(name));
    onEnter(input, button);
  }
  const origin = make("p", "skw-faint", {});
  subscribeAccount((now) => {
    setLine(origin, now.has_default_limits ? t(ABOUT_DEFAULT) : "");
    for (const [name, input] of Object.entries(inputs)) {
      input.disabled = !usable(now).limits;
      if (!edited.has(name)) input.value = now.limits[name] ?? "";
    }
    button.disabled = !usable(now).limits;
  });
  const fields = LIMITS.map(([name, text]) => make("label", "skw-field", {}, t(text), inputs[name]));
  const element = make(
    "section", "skw-part", { "aria-label": t("Limits") },
    make("p", "skw-strong", {}, t("Spending limits in US dollars")),
    make("div", "skw-thirds", {}, ...fields),
    origin,
    make("div", "skw-buttons", {}, button),
    result.element,
  );
  return { element, focus: () => inputs.per_run.focus() };
}

/** Whether remote tasks are collected when ComfyUI starts. */
function createCollectPart() {
  const box = make("input", "", { type: "checkbox" });
  const result = resultLine();
  const save = result.wrap(async () => {
    box.disabled = true;
    try {
      publish(await post("settings", { collect_at_start: box.checked }));
      result.say(t("Saved."));
    } catch (error) {
      box.checked = !box.checked; // undo the click
      throw error;
    } finally {
      box.disabled = false;
    }
  });
  box.addEventListener("change", save);
  subscribeAccount((now) => {
    if (!box.disabled) box.checked = now.collect_at_start === true;
  });
  const element = make(
    "section", "skw-part", { "aria-label": t("When ComfyUI starts") },
    make("label", "skw-check", {}, box, t(COLLECT)),
    make("p", "skw-faint", {}, t(ABOUT_COLLECT)),
    result.element,
  );
  return { element };
}

// not in a <form>: browsers offer to save what is typed into one
function secretInput() {
  return make("input", "skw-input", { type: "password", autocomplete: "off", spellcheck: "false" });
}

function limitInput() {
  const attributes = { type: "text", inputmode: "decimal", autocomplete: "off" };
  return make("input", "skw-input", { ...attributes, placeholder: t("no limit") });
}

function onEnter(input, button) {
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") button.click();
  });
}

/** A line with the result of a button; `wrap` shows an error's message there. */
function resultLine() {
  const element = make("p", "skw-result", { role: "status" });
  const say = (text, isBad = false) => {
    setText(element, text);
    element.classList.toggle("skw-bad", isBad);
  };
  const wrap = (work) => async () => {
    say("");
    try {
      await work();
    } catch (error) {
      say(error.message, true);
    }
  };
  return { element, say, wrap };
}
