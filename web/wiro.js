// The sidebar tab "Wiro" and its section in the settings: the remote tasks of this server.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

import { createAccountForm } from "./wiro/account.mjs";
import { preparePrice, renewPrices, showPrices } from "./wiro/badge.mjs";
import { guard } from "./wiro/dom.mjs";
import { addModelButton } from "./wiro/models.mjs";
import { createPanel } from "./wiro/panel.mjs";

let panel = null; // made when the tab is opened for the first time
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

function listen() {
  api.addEventListener("skyreels.wiro", guard(({ detail }) => {
    panel?.hear(detail);
    if (detail.state === "ended") renewPrices();
  }));
  api.addEventListener("reconnecting", guard(() => panel?.lose()));
  api.addEventListener("reconnected", guard(() => panel?.regain()));
}

// a setting of a type of its own: its value stays "", the page never stores anything of it
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
    preparePrice(node);
  }),
  setup: guard(() => {
    addStyle();
    listen();
    showPrices();
    app.extensionManager.registerSidebarTab({
      id: "skyreels-wiro",
      icon: "pi pi-cloud",
      title: "Wiro",
      tooltip: "Wiro: remote tasks",
      type: "custom",
      render: guard(showPanel),
      destroy: guard(() => panel?.unmount()),
    });
  }),
});
