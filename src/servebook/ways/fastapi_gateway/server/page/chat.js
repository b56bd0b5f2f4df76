// The chat page: sends a message to /chat/stream and shows the answer as it comes.

// Every element that has an id, by that id.
const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const HISTORY_TURNS = 50; // what the gateway takes
const TOO_LONG = ["too_long", "too_large"]; // for the model, for the gateway

let history = [];
let running = null; // the AbortController of the answer under way

class GatewayError extends Error {}

// The events of a response: split at blank lines, whatever pieces the network delivers. The decoder keeps the bytes
// of a half-received character until the rest is there.
async function* serverSentEvents(response) {
  let waiting = "";
  for await (const piece of chunksOf(response.body.pipeThrough(new TextDecoderStream()))) {
    const parts = (waiting + piece).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const fields = { event: "message", data: "" };
      for (const line of part.split("\n")) {
        const colon = line.indexOf(": ");
        if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
      }
      yield fields;
    }
  }
}

async function* chunksOf(stream) {
  const reader = stream.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}

// The response to `ask`. A conversation that has grown too long goes without its oldest question and answer, then
// without the next, until it fits: `ask.history` is then what was taken. Throws GatewayError as `answer` does.
async function accepted(ask, signal) {
  const headers = { "Content-Type": "application/json" };
  if (page.key.value) headers.Authorization = `Bearer ${page.key.value}`;
  for (;;) {
    const response = await fetch("/chat/stream", { method: "POST", headers, body: JSON.stringify(ask), signal });
    if (response.ok) return response;
    if (response.status === 401) {
      page.options.open = true;
      page.key.focus();
    }
    const error = (await response.json().catch(() => null))?.error;
    if (!TOO_LONG.includes(error?.code) || ask.history.length === 0) {
      throw new GatewayError(error?.message ?? `The gateway answered ${response.status}.`);
    }
    ask.history.splice(0, 2);
  }
}

// The answer to `ask`, event by event; throws GatewayError with words for the reader.
async function* answer(ask, signal) {
  const response = await accepted(ask, signal);
  for await (const { event, data } of serverSentEvents(response)) {
    if (data === "[DONE]") return;
    const content = JSON.parse(data);
    if (event === "error") throw new GatewayError(content.error.message);
    yield content;
  }
  throw new GatewayError("The gateway closed the connection before the answer was complete.");
}

function bubble(role, text) {
  page.log.querySelector(".empty")?.remove();
  const article = document.createElement("article");
  article.className = role;
  article.setAttribute("aria-label", role === "user" ? "You" : "Model");
  const words = document.createElement("p");
  words.dir = "auto";
  words.textContent = text;
  article.append(words);
  page.log.append(article);
  page.log.scrollTop = page.log.scrollHeight;
  return article;
}

function note(article, text, wrong = false) {
  const line = document.createElement("p");
  line.className = wrong ? "note error" : "note";
  line.textContent = text;
  article.append(line);
}

function say(text, wrong = false) {
  page.status.textContent = text;
  page.status.classList.toggle("error", wrong);
}

function busy(on) {
  page.send.hidden = on;
  page.stop.hidden = !on;
}

async function send(message) {
  const ask = { message, history: history.slice(-HISTORY_TURNS), max_tokens: Number(page["max-tokens"].value) };
  const turns = ask.history.length;
  if (page.system.value) ask.system = page.system.value;
  if (page.temperature.value !== "") ask.temperature = Number(page.temperature.value);

  bubble("user", message);
  const article = bubble("assistant", "");
  const words = article.firstChild;
  const control = new AbortController();
  running = control;
  busy(true);
  article.setAttribute("aria-busy", "true"); // a screen reader reads the answer once, when it is complete
  for (const field of [page.ttft, page.rate, page.tokens]) field.textContent = "–";
  say("Waiting for the first token …");

  const sent = performance.now();
  let first = 0;
  let pieces = 0;
  let text = "";
  try {
    for await (const content of answer(ask, control.signal)) {
      if (content.text) {
        const now = performance.now();
        const follow = page.log.scrollHeight - page.log.scrollTop - page.log.clientHeight < 40;
        words.textContent = text += content.text;
        if (follow) page.log.scrollTop = page.log.scrollHeight;
        pieces += 1;
        if (pieces === 1) {
          first = now;
          page.ttft.textContent = `${Math.round(first - sent)} ms`;
          say("Answering …");
        } else {
          page.rate.textContent = speed(pieces, now - first);
        }
        page.tokens.textContent = `≈ ${pieces}`; // a piece may hold several tokens; the exact number comes last
      } else if (content.usage) {
        const tokens = content.usage.completion_tokens;
        page.tokens.textContent = `${tokens} out, ${content.usage.prompt_tokens} in`;
        if (pieces > 1) page.rate.textContent = speed(tokens, performance.now() - first);
        if (content.finish_reason === "length") note(article, "Cut at the longest answer.");
      }
    }
    if (ask.history.length < turns) note(article, "The oldest messages were left out: the model takes no more.");
    say("Answer complete.");
  } catch (error) {
    if (control.signal.aborted) {
      note(article, "Stopped.");
      if (running === control) say("Stopped; the engine stops too.");
    } else {
      const reason = error instanceof GatewayError ? error.message : "The gateway cannot be reached.";
      note(article, reason, true);
      say(reason, true);
      if (!page.message.value) page.message.value = message;
    }
  } finally {
    article.removeAttribute("aria-busy");
    if (running === control) {
      running = null;
      busy(false);
      if (text) history = [...ask.history, { role: "user", content: message }, { role: "assistant", content: text }];
    }
  }
}

function speed(tokens, milliseconds) {
  return `${((1000 * (tokens - 1)) / milliseconds).toFixed(1)} tokens/s`;
}

function stop() {
  running?.abort();
}

page.form.addEventListener("submit", (event) => {
  event.preventDefault();
  const message = page.message.value.trim();
  if (!message || running) return;
  page.message.value = "";
  send(message);
  page.message.focus();
});

// A wrong value in there would keep the form from being sent, and nobody would see why.
const showOptions = () => { page.options.open = true; };
page.options.addEventListener("invalid", showOptions, { capture: true }); // it does not bubble

page.message.addEventListener("keydown", (event) => {
  // While a Korean syllable is being composed, Enter belongs to the input method.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    page.form.requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});

page.stop.addEventListener("click", () => {
  stop();
  page.message.focus();
});

page.clear.addEventListener("click", () => {
  stop();
  running = null;
  busy(false);
  history = [];
  page.log.replaceChildren();
  say("New chat.");
  page.message.focus();
});

page.message.focus();
