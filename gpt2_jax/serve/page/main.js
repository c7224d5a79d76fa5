// Tabs, problems, the key; starts the three views.

import * as api from "./api.js";
import { startInside } from "./inside.js";
import { startPrompt } from "./prompt.js";
import { startWrite } from "./write.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

function show(tab, focus = false) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  if (focus) tab.focus();
  document.dispatchEvent(new CustomEvent("view", { detail: tab.getAttribute("aria-controls") }));
}

tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) show(tabs[(i + step + tabs.length) % tabs.length], true);
  });
});

const problem = document.getElementById("problem");
const keyForm = document.getElementById("key-form");

// Show what went wrong, or nothing any more.
export function report(error) {
  problem.hidden = !error;
  problem.textContent = error ? error.message : "";
  if (error && error.status === 401) keyForm.hidden = false;
}

async function start() {
  try {
    const card = await api.describe();
    document.getElementById("model").textContent = card.id;
    report(null);
    keyForm.hidden = true;
    document.dispatchEvent(new CustomEvent("model", { detail: card }));
  } catch (error) {
    report(error);
  }
}

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey(document.getElementById("key").value);
  start();
});

startPrompt(report);
startWrite(report);
startInside(report);
const named = tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash);
show(named || tabs[0]);
start();
