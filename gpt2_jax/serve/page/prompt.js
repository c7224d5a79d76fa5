// The first view: a prompt, sampling controls, texts side by side as they are written.

import * as api from "./api.js";

// The model card of gpt2 offers these eight.
const EXAMPLES = [
  "My name is Julien and I like to",
  "My name is Thomas and my main",
  "My name is Mariama, my favorite",
  "My name is Clara and I am",
  "My name is Lewis and I like to",
  "My name is Merve and my favorite",
  "My name is Teven and I am",
  "Once upon a time,",
];
const get = (id) => document.getElementById(id);

export function shownBeside(id) {
  const show = () => (get(`${id}-shown`).textContent = Number(get(id).value).toFixed(2));
  get(id).addEventListener("input", show);
  show();
}

// From no tint for a sure token to full tint at one in a thousand.
export function tint(logprob) {
  return Math.min(1, -logprob / Math.log(1000)) * 0.75;
}

export function startPrompt(report) {
  shownBeside("temperature");
  shownBeside("top-p");
  let running = null;

  for (const text of EXAMPLES) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => {
      get("prompt-text").value = text;
      get("prompt-form").requestSubmit();
    });
    get("examples").append(button);
  }

  function options() {
    const asked = {
      prompt: get("prompt-text").value,
      max_tokens: Number(get("length").value),
      temperature: Number(get("temperature").value),
      top_p: Number(get("top-p").value),
      n: Number(get("samples").value),
      logprobs: 0,
    };
    if (get("top-k").value) asked.top_k = Number(get("top-k").value);
    if (get("seed").value) asked.seed = Number(get("seed").value);
    return asked;
  }

  function columns(prompt, count) {
    get("texts").replaceChildren();
    return Array.from({ length: count }, (_, i) => {
      const box = document.createElement("div");
      box.className = "text";
      box.dataset.characters = 0;
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", `Text ${i + 1}`);
      const given = document.createElement("span");
      given.className = "given";
      given.textContent = prompt;
      box.append(given);
      get("texts").append(box);
      return box;
    });
  }

  // Tokens of one piece; text that is cut within a token keeps to the piece's end.
  function append(box, choice) {
    const characters = [...choice.text]; // as Python counts them
    const { token_logprobs: values, text_offset: starts } = choice.logprobs;
    const begin = Number(box.dataset.characters);
    box.dataset.characters = begin + characters.length;
    const tinted = get("tint").checked;
    const cuts = starts.map((at) => Math.min(Math.max(at - begin, 0), characters.length));
    if (characters.length) cuts[0] = 0;
    cuts.forEach((at, i) => {
      const span = document.createElement("span");
      span.textContent = characters.slice(at, cuts[i + 1] ?? characters.length).join("");
      if (values[i] !== undefined) {
        span.dataset.logprob = values[i];
        span.title = `${(100 * Math.exp(values[i])).toPrecision(2)} %`;
        if (tinted) span.style.backgroundColor = heat(values[i]);
      }
      box.append(span);
    });
    box.scrollTop = box.scrollHeight;
  }

  function heat(logprob) {
    return `rgba(${getComputedStyle(document.body).getPropertyValue("--heat")}, ${tint(logprob)})`;
  }

  get("tint").addEventListener("change", () => {
    for (const span of get("texts").querySelectorAll("[data-logprob]")) {
      span.style.backgroundColor = get("tint").checked ? heat(Number(span.dataset.logprob)) : "";
    }
  });

  get("prompt-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    running?.abort();
    const mine = (running = new AbortController());
    const asked = options();
    const boxes = columns(asked.prompt, asked.n);
    report(null);
    get("stop").hidden = false;
    get("prompt-status").textContent = "Writing …";
    const began = performance.now();
    let tokens = 0;
    try {
      for await (const choice of api.stream(asked, mine.signal)) {
        append(boxes[choice.index], choice);
        tokens += choice.logprobs.tokens.length;
      }
      const rate = (1000 * tokens) / (performance.now() - began);
      get("prompt-status").textContent = `Done: ${tokens} tokens, ${rate.toFixed(1)} a second.`;
    } catch (error) {
      if (error.name !== "AbortError") report(error);
      if (running === mine) get("prompt-status").textContent = "Stopped.";
    }
    if (running === mine) {
      get("stop").hidden = true;
      running = null;
    }
  });

  get("stop").addEventListener("click", () => running?.abort());
}
