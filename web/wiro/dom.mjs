// Small helpers for elements. Text of the server only ever goes in as text, never as HTML.

const REALLY_FOR_MS = 6000; // then a two-step button forgets its first click
const DOUBLE_CLICK_MS = 400; // the second half of a double click confirms nothing

let hasFailed = false;

/** `work`, but an error in it is logged once for all and leaves the page usable. */
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
  if (!hasFailed) console.warn("[SkyReels] the Wiro panel has a problem:", error);
  hasFailed = true;
}

export function make(tag, className = "", attributes = {}, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// writing the same text again would move the cursor of a selection and of a screen reader
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A line that vanishes when there is nothing to say. */
export function setLine(element, text) {
  setText(element, text);
  element.hidden = !text;
}

/** A button that waits for its work; it stays focusable meanwhile. */
export function actionButton(label, work) {
  const button = make("button", "skw-button", { type: "button" }, label);
  button.addEventListener("click", () => runOnce(button, work));
  return button;
}

/** A button that asks once more, in its own place, before it works. */
export function askingButton(label, question, work) {
  const button = make("button", "skw-button skw-asking", { type: "button" });
  // both texts lie in one grid cell: the button never changes its size
  button.append(make("span", "", {}, label), make("span", "", {}, question));
  let askedAt = 0;
  let timer = 0;
  const ask = (isAsked) => {
    clearTimeout(timer);
    askedAt = isAsked ? performance.now() : 0;
    button.classList.toggle("skw-asked", isAsked);
    if (isAsked) timer = setTimeout(ask, REALLY_FOR_MS, false);
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
