// The account: a store that both forms (panel and settings) follow, and the form itself.
import { actionButton, askingButton, complain, make, setLine, setText } from "./dom.mjs";
import { get, post } from "./server.mjs";
import { keyLine } from "./words.mjs";

const LIMITS = [
  ["per_run", "Per run"],
  ["per_day", "Per day"],
  ["per_month", "Per month"],
];
const NO_LIMIT = "A limit is a number of US dollars such as 0.50, or empty for no limit.";
const ABOUT_KEY =
  "The key is kept in a file of the ComfyUI server, never in a workflow and never in this " +
  "browser. WIRO_API_KEY and WIRO_API_SECRET in the server's environment go before it.";
const PLAIN_HTTP =
  "This page is not encrypted: others on the network could read a key typed here. Set it in " +
  "the server's environment instead.";

const listeners = new Set();
let account = null;

/** Call `listener` now, if the account is known, and whenever it changes. */
export function followAccount(listener) {
  listeners.add(listener);
  if (account) listener(account);
}

export async function loadAccount() {
  tell(await get("account"));
}

/** False only when the server said so. */
export function mayHaveKey() {
  return account?.has_key !== false;
}

function tell(answer) {
  account = answer;
  for (const listener of listeners) {
    try {
      listener(account);
    } catch (error) {
      complain(error);
    }
  }
}

/** {element, refresh, clear, focus}: the account's form. */
export function createAccountForm() {
  const key = createKeyPart();
  const limits = createLimitsPart();
  return {
    element: make("div", "skw skw-form", {}, key.element, limits.element),
    focus: key.focus,
    clear: key.clear,
    refresh() {
      key.clear();
      loadAccount().catch((error) => key.say(error.message, true));
    },
  };
}

function createKeyPart() {
  const status = make("p", "skw-strong", {}, "…");
  const problem = make("p", "skw-warning", {});
  const [key, secret] = [secretInput(), secretInput()];
  const result = resultLine();
  const clear = () => [key, secret].forEach((input) => (input.value = ""));
  const store = async (text, api_key, api_secret) => {
    tell(await post("account", { api_key, api_secret }));
    clear();
    result.say(text);
  };
  const save = result.wrap(async () => {
    if (!key.value.trim()) return result.say("Type the API key first.", true);
    await store("Saved.", key.value.trim(), secret.value.trim());
  });
  const remove = result.wrap(() => store("The stored key is removed.", "", ""));
  const test = result.wrap(async () => {
    result.say("Asking the service…");
    result.say((await post("account/test")).message);
  });
  const buttons = {
    save: actionButton("Save key", save),
    test: actionButton("Test connection", test),
    remove: askingButton("Remove key", "Really remove?", remove),
  };
  for (const input of [key, secret]) onEnter(input, buttons.save);
  followAccount((now) => {
    const isFixed = now.source === "environment"; // the stored key would have no effect
    setText(status, keyLine(now));
    setLine(problem, now.problem ?? "");
    for (const control of [key, secret, buttons.save]) control.disabled = isFixed;
    buttons.remove.disabled = now.source !== "file";
    buttons.test.disabled = !now.has_key;
  });
  const element = make(
    "section", "skw-part", { "aria-label": "Wiro key" },
    status,
    problem,
    make("label", "skw-field", {}, "API key", key),
    make("label", "skw-field", {}, "API secret, if the project has one", secret),
    make("div", "skw-buttons", {}, ...Object.values(buttons)),
    result.element,
    make("p", "skw-faint", {}, ABOUT_KEY),
  );
  if (!window.isSecureContext) element.append(make("p", "skw-warning", {}, PLAIN_HTTP));
  return { element, clear, say: result.say, focus: () => key.focus() };
}

function createLimitsPart() {
  const inputs = Object.fromEntries(LIMITS.map(([name]) => [name, limitInput()]));
  const edited = new Set(); // what somebody is typing is not overwritten by an answer
  const result = resultLine();
  const save = result.wrap(async () => {
    const limits = {};
    for (const [name, input] of Object.entries(inputs)) {
      const amount = input.value.trim().replace(",", ".");
      if (!/^(\d{1,9}(\.\d{1,9})?)?$/.test(amount)) {
        input.focus();
        return result.say(NO_LIMIT, true);
      }
      limits[name] = amount || null;
    }
    const answer = await post("limits", limits);
    edited.clear();
    tell(answer);
    result.say("Saved.");
  });
  const button = actionButton("Save limits", save);
  for (const [name, input] of Object.entries(inputs)) {
    input.addEventListener("input", () => edited.add(name));
    onEnter(input, button);
  }
  followAccount(({ limits }) => {
    for (const [name, input] of Object.entries(inputs)) {
      if (!edited.has(name)) input.value = limits[name] ?? "";
    }
  });
  const fields = LIMITS.map(([name, text]) => make("label", "skw-field", {}, text, inputs[name]));
  const element = make(
    "section", "skw-part", { "aria-label": "Limits" },
    make("p", "skw-strong", {}, "Limits in US dollars"),
    make("div", "skw-thirds", {}, ...fields),
    make("div", "skw-buttons", {}, button),
    result.element,
  );
  return { element };
}

// no <form> around it: browsers offer to store what is typed into one
function secretInput() {
  return make("input", "skw-input", { type: "password", autocomplete: "off", spellcheck: "false" });
}

function limitInput() {
  const attributes = { type: "text", inputmode: "decimal", autocomplete: "off" };
  return make("input", "skw-input", { ...attributes, placeholder: "no limit" });
}

function onEnter(input, button) {
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") button.click();
  });
}

/** One line for the outcome of a button; `wrap` makes a server's error its text. */
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
