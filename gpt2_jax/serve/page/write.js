// The second view: a document that writes on. Tab asks, arrows choose, Enter accepts.

import * as api from "./api.js";
import { shownBeside } from "./prompt.js";

const get = (id) => document.getElementById(id);
const LOOKS_BACK = 16000; // characters before the cursor that are sent

export function startWrite(report) {
  shownBeside("write-temperature");
  const text = get("document");
  const list = get("suggestions");
  let place = 0; // of the cursor that the suggestions are for
  let chosen = 0;
  let asking = null;
  let leaving = false; // after Escape, Tab moves on

  try {
    text.value = localStorage.getItem("document") ?? "";
  } catch {
    get("write-status").textContent = "This browser keeps nothing: copy your text before you leave.";
  }
  text.addEventListener("input", keep);

  function keep() {
    close();
    try {
      localStorage.setItem("document", text.value);
    } catch (error) {
      report(new Error(`The text is not kept: ${error.message}`));
    }
  }

  function close() {
    asking?.abort();
    asking = null;
    list.hidden = true;
    list.replaceChildren();
    text.removeAttribute("aria-activedescendant");
  }

  function choose(index) {
    chosen = (index + list.children.length) % list.children.length;
    [...list.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === chosen)));
    text.setAttribute("aria-activedescendant", list.children[chosen].id);
    list.children[chosen].scrollIntoView({ block: "nearest" });
    get("write-status").textContent = `${chosen + 1} of ${list.children.length}; Enter accepts.`;
  }

  function accept() {
    const addition = list.children[chosen].dataset.text;
    text.focus();
    text.setSelectionRange(place, place);
    // The one way to insert that the browser's own undo knows.
    if (!document.execCommand("insertText", false, addition)) {
      text.setRangeText(addition, place, place, "end");
      keep();
    }
    close();
    get("write-status").textContent = "Accepted.";
  }

  async function suggest() {
    close();
    place = text.selectionStart;
    const before = text.value.slice(Math.max(0, place - LOOKS_BACK), place);
    if (!before) {
      get("write-status").textContent = "Write a few words first.";
      return;
    }
    const mine = (asking = new AbortController());
    get("write-status").textContent = "Thinking …";
    report(null);
    try {
      const found = await api.complete(
        {
          prompt: before,
          max_tokens: Number(get("write-length").value),
          temperature: Number(get("write-temperature").value),
          n: 3,
        },
        mine.signal,
      );
      if (asking !== mine) return;
      const texts = [...new Set(found.choices.map((choice) => choice.text))].filter(Boolean);
      if (!texts.length) {
        get("write-status").textContent = "The model would end the text here.";
        return;
      }
      texts.forEach((one, i) => {
        const item = document.createElement("li");
        item.id = `suggestion-${i}`;
        item.setAttribute("role", "option");
        item.dataset.text = one;
        item.textContent = one.replace(/\n/g, "⏎\n");
        item.addEventListener("click", () => {
          choose(i);
          accept();
        });
        list.append(item);
      });
      list.hidden = false;
      choose(0);
    } catch (error) {
      if (error.name === "AbortError") return;
      report(error);
      get("write-status").textContent = "No suggestions; your text is kept.";
    }
  }

  text.addEventListener("keydown", (event) => {
    const open = !list.hidden;
    if (event.key === "Tab" && !event.shiftKey && !leaving) {
      event.preventDefault();
      suggest();
    } else if (open && event.key === "ArrowDown") {
      event.preventDefault();
      choose(chosen + 1);
    } else if (open && event.key === "ArrowUp") {
      event.preventDefault();
      choose(chosen - 1);
    } else if (open && event.key === "Enter") {
      event.preventDefault();
      accept();
    } else if (event.key === "Escape") {
      close();
      get("write-status").textContent = "";
    }
    leaving = event.key === "Escape";
  });
  text.addEventListener("pointerdown", close);
  get("suggest").addEventListener("click", () => {
    text.focus();
    suggest();
  });
}
