// The sidebar tab "Wiro" with this server's remote tasks, the settings section, badges, buttons.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

import { createAccountForm } from "./wiro/account.mjs";
import { addPriceBadge, refreshPrices, watchPrices } from "./wiro/badge.mjs";
import { complain, guard } from "./wiro/dom.mjs";
import { languageOf, loadLanguage, t } from "./wiro/language.mjs";
import { keepCached, keepOutcome, restoreOutcome } from "./wiro/kept.mjs";
import { addModelButton } from "./wiro/models.mjs";
import { createPanel } from "./wiro/panel.mjs";

let panel = null; // created when the tab is first opened
let settingsForm = null;

function addStyle() {
  for (const name of ["wiro", "models"]) {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL(`./wiro/${name}.css`, import.meta.url).href;
    document.head.append(link);
  }
}

// the page may call this again for the same container
function showPanel(container) {
  panel ??= createPanel();
  panel.mount(container);
}

function rebuild() {
  const container = panel?.element.parentNode;
  panel?.unmount();
  panel = settingsForm = null;
  if (container) showPanel(container);
}

/** Take the page's language; it may change at any time, as the nodes' texts do. */
async function followLanguage() {
  const take = (locale) => loadLanguage(languageOf(locale)).catch(complain); // English shows then
  app.ui?.settings?.addEventListener("Comfy.Locale.change", ({ detail }) =>
    take(detail.value).then(guard(rebuild)),
  );
  await take(app.extensionManager?.setting?.get("Comfy.Locale"));
}

function addListeners() {
  api.addEventListener("skyreels.wiro", guard(({ detail }) => {
    panel?.onTask(detail);
    if (detail.state === "ended") refreshPrices();
  }));
  api.addEventListener("skyreels.wiro.outcome", guard(({ detail }) => keepOutcome(detail)));
  api.addEventListener("execution_cached", guard(({ detail }) => keepCached(detail?.nodes)));
  api.addEventListener("reconnecting", guard(() => panel?.onDisconnect()));
  api.addEventListener("reconnected", guard(() => panel?.onReconnect()));
}

const addPage = guard(() => {
  addStyle();
  addListeners();
  watchPrices();
  app.extensionManager.registerSidebarTab({
    id: "skyreels-wiro",
    icon: "pi pi-cloud",
    title: "Wiro",
    tooltip: t("Wiro: remote tasks"),
    type: "custom",
    render: guard(showPanel),
    destroy: guard(() => panel?.unmount()),
  });
});

// a setting of a custom type: its value stays "", so the page stores nothing
function showSettings() {
  settingsForm ??= createAccountForm();
  settingsForm.refresh();
  return settingsForm.element;
}

app.registerExtension({
  name: "skyreels.wiro",
  settings: [
    {
      id: "SkyReels.Wiro.Account",
      category: ["SkyReels", "Wiro", "Account"],
      name: "Wiro account and limits",
      type: guard(showSettings, () => document.createElement("div")),
      defaultValue: "",
    },
  ],
  nodeCreated: guard((node) => {
    if (node.comfyClass === "WiroRunModel") addModelButton(node);
    addPriceBadge(node);
  }),
  loadedGraphNode: guard(restoreOutcome),
  setup: async () => {
    await followLanguage().catch(complain);
    addPage();
  },
});
