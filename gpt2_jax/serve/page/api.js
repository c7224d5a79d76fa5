// Talks to the server. Nothing here touches the page.

let key = sessionStorage.getItem("key") || "";
export let card = null; // of the model that is served

export class Problem extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function useKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const how = { headers, signal };
  if (body !== undefined) Object.assign(how, { method: "POST", body: JSON.stringify(body) });
  let response;
  try {
    response = await fetch(path, how);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached. Is it still running?", 0);
  }
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // no JSON: the status says enough
  }
  throw new Problem(message, response.status);
}

export async function describe() {
  card = (await (await ask("/v1/models")).json()).data[0];
  return card;
}

// A prompt that is too long loses its beginning.
function completion(asked) {
  const room = Math.max(1, card.max_model_len - asked.max_tokens);
  return { model: card.id, truncate_prompt_tokens: room, ...asked };
}

export async function complete(asked, signal) {
  return (await ask("/v1/completions", completion(asked), signal)).json();
}

// Give every choice of every event as it comes.
export async function* stream(asked, signal) {
  const body = completion({ ...asked, stream: true });
  const response = await ask("/v1/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  while (true) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The connection was lost; what had come is kept.", 0);
    }
    if (part.done) break;
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") {
        ended = true;
        continue;
      }
      const found = JSON.parse(data);
      if (found.error) throw new Problem(found.error.message, 500);
      yield* found.choices;
    }
  }
  if (!ended) throw new Problem("The connection was lost; what had come is kept.", 0);
}

export async function inspect(prompt, layer, signal) {
  return (await ask("/v1/inspect", { model: card.id, prompt, layer }, signal)).json();
}
