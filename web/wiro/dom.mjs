// Helpers for elements. Text from the server is inserted as text, never as HTML.

const CONFIRM_MS = 6000; // a second click after that does not confirm
const DOUBLE_CLICK_MS = 400; // nor does the second half of a double click

let hasComplained = false;

/** `work` with its errors caught, so that the page stays usable; only the first is logged. */
export function guard(work, fallback = () => undefined) {
  return (...values) => {
    try {
      return work(...values);
    } catch (error) {
      complain(error);
      return fallback();
    }
  };
}

export function complain(error) {
  if (!hasComplained) console.warn("[SkyReels] error in the Wiro panel:", error);
  hasComplained = true;
}

export function make(tag, className = "", attributes = {}, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// rewriting the same text would reset a selection and a screen reader's position
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Set a line's text; hide it if empty. */
export function setLine(element, text) {
  setText(element, text);
  element.hidden = !text;
}

/** A button that is disabled, but focusable, while its work runs. */
export function actionButton(label, work) {
  const button = make("button", "skw-button", { type: "button" }, label);
  button.addEventListener("click", () => runOnce(button, work));
  return button;
}

/** A button that asks for a second click before it works. */
export function confirmButton(label, question, work) {
  const button = make("button", "skw-button skw-confirm", { type: "button" });
  // both texts are in one grid cell: the button keeps its size
  button.append(make("span", "", {}, label), make("span", "", {}, question));
  let askedAt = 0;
  let timer = 0;
  const ask = (isConfirming) => {
    clearTimeout(timer);
    askedAt = isConfirming ? performance.now() : 0;
    button.classList.toggle("skw-confirming", isConfirming);
    if (isConfirming) timer = setTimeout(ask, CONFIRM_MS, false);
  };
  button.addEventListener("click", () => {
    if (isBusy(button)) return;
    if (!askedAt) ask(true);
    else if (performance.now() - askedAt > DOUBLE_CLICK_MS) {
      ask(false);
      runOnce(button, work);
    }
  });
  button.addEventListener("blur", () => ask(false));
  button.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !askedAt) return;
    event.stopPropagation();
    ask(false);
  });
  return button;
}

function isBusy(button) {
  return button.getAttribute("aria-disabled") === "true";
}

async function runOnce(button, work) {
  if (isBusy(button)) return;
  button.setAttribute("aria-disabled", "true");
  try {
    await work();
  } catch (error) {
    complain(error);
  } finally {
    button.removeAttribute("aria-disabled");
  }
}
