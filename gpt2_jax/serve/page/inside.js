// The third view: tokens, where heads look, what could come next, surprise.

import * as api from "./api.js";
import { tint } from "./prompt.js";

const get = (id) => document.getElementById(id);
const MEAN = "mean";

function colour(name, strength = 1) {
  const value = getComputedStyle(document.body).getPropertyValue(name).trim();
  return value.startsWith("#") ? value : `rgba(${value}, ${strength})`;
}

// Blanks and line ends must be seen.
function shown(token) {
  return token.replace(/\n/g, "⏎").replace(/^ /, "·").replace(/\t/g, "⇥");
}

// A canvas of its shown width, sharp on dense screens.
function prepare(canvas, height) {
  const width = Math.max(canvas.clientWidth, 200);
  const scale = window.devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.clearRect(0, 0, width, height);
  pen.font = "12px system-ui, sans-serif";
  return [pen, width];
}

export function startInside(report) {
  let found = null;
  let weights = []; // query, key up to the query: of the chosen head
  let chosen = 0;
  let asking = null;

  document.addEventListener("model", (event) => {
    const card = event.detail;
    fill(get("layer"), Array.from({ length: card.n_layer }, (_, i) => [i, `${i + 1} of ${card.n_layer}`]));
    get("layer").value = String(Math.floor(card.n_layer / 2));
    const heads = Array.from({ length: card.n_head }, (_, i) => [i, `${i + 1} of ${card.n_head}`]);
    fill(get("head"), [[MEAN, "mean of all"], ...heads]);
  });

  function fill(select, pairs) {
    select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
  }

  async function look() {
    asking?.abort();
    const mine = (asking = new AbortController());
    report(null);
    get("inside-status").textContent = "Looking …";
    try {
      const answer = await api.inspect(get("inside-text").value, Number(get("layer").value), mine.signal);
      if (asking !== mine) return;
      found = answer;
      chosen = Math.min(chosen, found.tokens.length - 1);
      get("looked").hidden = false;
      get("save-picture").disabled = false;
      get("inside-status").textContent = `${found.tokens.length} tokens.`;
      drawTokens();
      takeHead();
    } catch (error) {
      if (error.name === "AbortError") return;
      report(error);
      get("inside-status").textContent = "";
    }
  }

  function takeHead() {
    if (!found) return;
    const head = get("head").value;
    if (head !== MEAN) {
      weights = found.attention[Number(head)];
    } else {
      const heads = found.attention;
      weights = heads[0].map((row, q) =>
        row.map((_, k) => heads.reduce((sum, one) => sum + one[q][k], 0) / heads.length),
      );
    }
    draw();
  }

  function drawTokens() {
    const spans = found.tokens.map((token, i) => {
      const span = document.createElement("span");
      span.id = `token-${i}`;
      span.setAttribute("role", "option");
      span.textContent = shown(token);
      const logprob = found.logprobs[i];
      if (logprob !== null) {
        span.style.backgroundColor = colour("--heat", tint(logprob));
        span.title = `${(-logprob / Math.LN2).toFixed(1)} bits`;
      }
      span.addEventListener("pointerenter", () => choose(i));
      span.addEventListener("click", () => choose(i));
      return span;
    });
    get("tokens").replaceChildren(...spans);
  }

  function choose(index) {
    if (index === chosen) return;
    chosen = index;
    draw();
  }

  function draw() {
    if (!found || get("inside").hidden) return;
    [...get("tokens").children].forEach((span, i) => span.setAttribute("aria-selected", String(i === chosen)));
    get("tokens").setAttribute("aria-activedescendant", `token-${chosen}`);
    get("arcs-token").textContent = shown(found.tokens[chosen]);
    drawMatrix();
    drawArcs();
    drawNext();
    drawSurprise();
    const most = weights[chosen].map((share, i) => [share, i]).sort((a, b) => b[0] - a[0]).slice(0, 3);
    get("looks").textContent = most.map(([share, i]) => `${shown(found.tokens[i])} ${(100 * share).toFixed(0)} %`).join(", ");
  }

  function drawMatrix() {
    const count = weights.length;
    const canvas = get("matrix");
    const [pen, width] = prepare(canvas, Math.min(Math.max(canvas.clientWidth, 200), 420));
    const cell = Math.min(width, parseInt(canvas.style.height)) / count;
    weights.forEach((row, q) =>
      row.forEach((share, k) => {
        pen.fillStyle = colour("--look", Math.sqrt(share));
        pen.fillRect(k * cell, q * cell, Math.max(cell - 0.5, 0.5), Math.max(cell - 0.5, 0.5));
      }),
    );
    pen.strokeStyle = colour("--accent");
    pen.strokeRect(0, chosen * cell, (chosen + 1) * cell, cell);
  }

  function drawArcs() {
    const count = found.tokens.length;
    const height = 220;
    const [pen, width] = prepare(get("arcs"), height);
    const step = width / count;
    const floor = height - 40;
    const at = (i) => (i + 0.5) * step;
    weights[chosen].forEach((share, i) => {
      if (share < 0.005) return;
      pen.strokeStyle = colour("--look", Math.min(1, 0.15 + share));
      pen.lineWidth = 1 + 7 * share;
      pen.beginPath();
      if (i === chosen) {
        pen.arc(at(i), floor - 8, 8, 0, 2 * Math.PI);
      } else {
        const radius = (at(chosen) - at(i)) / 2;
        pen.ellipse((at(chosen) + at(i)) / 2, floor, radius, Math.min(radius, floor - 8), 0, Math.PI, 2 * Math.PI);
      }
      pen.stroke();
    });
    pen.fillStyle = colour("--ink");
    pen.textAlign = "center";
    const every = Math.ceil(34 / step);
    found.tokens.forEach((token, i) => {
      if (i === chosen || (i % every === 0 && Math.abs(i - chosen) >= every)) {
        const half = pen.measureText(shown(token).slice(0, 8)).width / 2;
        const middle = Math.min(Math.max(at(i), half), width - half);
        pen.fillText(shown(token).slice(0, 8), middle, floor + 16);
      }
    });
  }

  function drawNext() {
    const rows = found.next[chosen].map(({ token, logprob }) => {
      const row = document.createElement("tr");
      const name = document.createElement("td");
      name.textContent = shown(token);
      const share = document.createElement("td");
      share.className = "share";
      const bar = document.createElement("meter");
      bar.max = 1;
      bar.value = Math.exp(logprob);
      share.append(bar, ` ${(100 * Math.exp(logprob)).toFixed(1)} %`);
      row.append(name, share);
      return row;
    });
    get("next").tBodies[0].replaceChildren(...rows);
  }

  function drawSurprise() {
    const height = 140;
    const [pen, width] = prepare(get("surprise"), height);
    const bits = found.logprobs.map((value) => (value === null ? 0 : -value / Math.LN2));
    const most = Math.max(1, ...bits);
    const step = width / bits.length;
    bits.forEach((value, i) => {
      const tall = (value / most) * (height - 24);
      pen.fillStyle = colour("--heat", 0.25 + (0.7 * value) / most);
      pen.fillRect(i * step, height - tall, Math.max(step - 1, 0.5), tall);
    });
    pen.fillStyle = colour("--ink");
    pen.textAlign = "left";
    pen.fillText(`${shown(found.tokens[chosen])}: ${bits[chosen].toFixed(1)} of ${most.toFixed(1)} bits`, 6, 14);
    pen.strokeStyle = colour("--accent");
    pen.strokeRect(chosen * step, 20, Math.max(step - 1, 1), height - 21);
  }

  // The four drawings beneath each other, on the page's own ground.
  get("save-picture").addEventListener("click", () => {
    const parts = ["matrix", "arcs", "surprise"].map(get);
    const picture = document.createElement("canvas");
    picture.width = Math.max(...parts.map((part) => part.width));
    picture.height = parts.reduce((sum, part) => sum + part.height + 16, 40);
    const pen = picture.getContext("2d");
    pen.fillStyle = colour("--ground");
    pen.fillRect(0, 0, picture.width, picture.height);
    pen.fillStyle = colour("--ink");
    pen.font = "20px system-ui, sans-serif";
    const head = get("head").selectedOptions[0].text;
    pen.fillText(`${api.card.id}, layer ${get("layer").selectedOptions[0].text}, head ${head}`, 8, 28);
    let top = 40;
    for (const part of parts) {
      pen.drawImage(part, 0, top);
      top += part.height + 16;
    }
    picture.toBlob((blob) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = "attention.png";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  });

  get("tokens").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !found) return;
    event.preventDefault();
    choose(Math.min(Math.max(chosen + step, 0), found.tokens.length - 1));
    get("tokens").children[chosen].scrollIntoView({ block: "nearest" });
  });
  get("matrix").addEventListener("pointermove", (event) => {
    const rows = Math.min(get("matrix").clientWidth, get("matrix").clientHeight);
    const row = Math.floor((event.offsetY / rows) * weights.length);
    if (row >= 0 && row < weights.length) choose(row);
  });
  get("inside-form").addEventListener("submit", (event) => {
    event.preventDefault();
    look();
  });
  get("layer").addEventListener("change", () => found && look());
  get("head").addEventListener("change", takeHead);
  addEventListener("resize", draw);
  document.addEventListener("view", (event) => event.detail === "inside" && draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => found && (drawTokens(), draw()));
}
