// The account: a store that both forms (panel and settings) follow, and the form itself.
import { actionButton, askingButton, complain, make, setLine, setText } from "./dom.mjs";
import { get, post } from "./server.mjs";
import { accountNotes, keyLine, usable } from "./words.mjs";

const LIMITS = [
  ["per_run", "Per run"],
  ["per_day", "Per day"],
  ["per_month", "Per month"],
];
const ABOUT_DEFAULT =
  "Nobody has set limits yet: until then these hold, and models whose price is not told do " +
  "not run. Save any (or none) to choose yourself.";
const NO_LIMIT = "A limit is a number of US dollars such as 0.50, or empty for no limit.";
const ABOUT_KEY =
  "The key is kept in a file of the ComfyUI server, never in a workflow and never in this " +
  "browser. WIRO_API_KEY and WIRO_API_SECRET in the server's environment go before it.";
const ABOUT_PROOF =
  "Wanted to replace or remove the key, and to raise or remove a limit; to lower one it is not.";
const START = "When ComfyUI starts, bring home what runs at Wiro";
const ABOUT_START =
  "Tasks that were under way when it ended are followed and their files fetched, four at a time. " +
  "Nothing is paid for.";
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

/** {element, refresh, clear, focus, focusLimits}: the account's form. */
export function createAccountForm() {
  const proof = createProofPart();
  const key = createKeyPart(proof);
  const limits = createLimitsPart(proof);
  const start = createStartPart();
  const notes = make("p", "skw-warning");
  followAccount((now) => setLine(notes, accountNotes(now).join(" ")));
  const clear = () => {
    key.clear();
    proof.clear();
  };
  return {
    element: make("div", "skw skw-form", {}, notes, key.element, limits.element, proof.element,
      start.element),
    focus: key.focus,
    focusLimits: limits.focus,
    clear,
    refresh() {
      clear();
      loadAccount().catch((error) => key.say(error.message, true));
    },
  };
}

/** The end of the key in use, which both other parts send along. */
function createProofPart() {
  const input = secretInput();
  const element = make(
    "section", "skw-part", { "aria-label": "Proof" },
    make("label", "skw-field", {}, "Last 4 characters of the key in use", input),
    make("p", "skw-faint", {}, ABOUT_PROOF),
  );
  followAccount((now) => (element.hidden = !usable(now).proof));
  return {
    element,
    clear: () => (input.value = ""),
    /** Post with the proof; if the server wants another one, go to its field. */
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
    tell(await proof.post("account", { api_key, api_secret }));
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
    const can = usable(now);
    setText(status, keyLine(now));
    setLine(problem, now.problem ?? "");
    for (const control of [key, secret, buttons.save]) control.disabled = !can.key;
    buttons.remove.disabled = !can.remove;
    buttons.test.disabled = !can.test;
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

function createLimitsPart(proof) {
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
    const answer = await proof.post("limits", limits);
    edited.clear();
    tell(answer);
    result.say("Saved.");
  });
  const button = actionButton("Save limits", save);
  for (const [name, input] of Object.entries(inputs)) {
    input.addEventListener("input", () => edited.add(name));
    onEnter(input, button);
  }
  const origin = make("p", "skw-faint", {});
  followAccount((now) => {
    setLine(origin, now.has_default_limits ? ABOUT_DEFAULT : "");
    for (const [name, input] of Object.entries(inputs)) {
      input.disabled = !usable(now).limits;
      if (!edited.has(name)) input.value = now.limits[name] ?? "";
    }
    button.disabled = !usable(now).limits;
  });
  const fields = LIMITS.map(([name, text]) => make("label", "skw-field", {}, text, inputs[name]));
  const element = make(
    "section", "skw-part", { "aria-label": "Limits" },
    make("p", "skw-strong", {}, "Limits in US dollars"),
    make("div", "skw-thirds", {}, ...fields),
    origin,
    make("div", "skw-buttons", {}, button),
    result.element,
  );
  return { element, focus: () => inputs.per_run.focus() };
}

/** What ComfyUI does with remote tasks when it starts. */
function createStartPart() {
  const box = make("input", "", { type: "checkbox" });
  const result = resultLine();
  const save = result.wrap(async () => {
    box.disabled = true;
    try {
      tell(await post("settings", { collect_at_start: box.checked }));
      result.say("Saved.");
    } catch (error) {
      box.checked = !box.checked; // as it was
      throw error;
    } finally {
      box.disabled = false;
    }
  });
  box.addEventListener("change", save);
  followAccount((now) => {
    if (!box.disabled) box.checked = now.collect_at_start === true;
  });
  const element = make(
    "section", "skw-part", { "aria-label": "When ComfyUI starts" },
    make("label", "skw-check", {}, box, START),
    make("p", "skw-faint", {}, ABOUT_START),
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
