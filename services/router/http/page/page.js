// The page at `/`: a conversation, what each answer took, and what the cluster does. No library, nothing kept.

const PHASES = ["admit", "tokenize", "route", "link", "queue", "prefill", "decode", "deliver"];
const BEAT_MS = 1000;
const $ = (id) => document.getElementById(id);
const settings = $("settings").elements;
let messages = [];
let running = null;

// The conversation.

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (running === null && text.trim() !== "") {
    $("prompt").value = "";
    answer(text);
  }
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

$("stop").addEventListener("click", () => running?.abort());

$("fresh").addEventListener("click", () => {
  running?.abort();
  messages = [];  // an answer that is still ending adds to the list that it began with
  $("talk").replaceChildren();
  $("prompt").focus();
});

$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = getComputedStyle(root).colorScheme === "light dark" ? matchMedia("(prefers-color-scheme: dark)").matches : root.dataset.theme === "dark";
  root.dataset.theme = dark ? "light" : "dark";
});

function addTurn(who, text) {
  const turn = $("turn").content.firstElementChild.cloneNode(true);
  turn.querySelector("h3").textContent = who;
  turn.querySelector(".text").textContent = text;
  $("talk").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function body(text) {
  const asked = { model: settings.model.value, stream: true, stream_options: { include_usage: true }, include_timing: true };
  for (const name of ["temperature", "max_tokens", "seed"]) {
    if (settings[name].value !== "") asked[name] = Number(settings[name].value);
  }
  if (settings.kind.value === "completion") return ["/v1/completions", { ...asked, prompt: text }];
  const system = settings.system.value.trim();
  const told = system === "" ? messages : [{ role: "system", content: system }, ...messages];
  return ["/v1/chat/completions", { ...asked, messages: told }];
}

function headers() {
  const key = settings.key.value;
  return key === "" ? {} : { authorization: `Bearer ${key}` };
}

async function answer(text) {
  addTurn("You", text);
  const conversation = messages;
  conversation.push({ role: "user", content: text });
  const turn = addTurn(settings.model.value || "Answer", "");
  const place = turn.querySelector(".text"), thoughts = turn.querySelector(".thoughts");
  turn.classList.add("is-answer", "is-open");
  running = new AbortController();
  showRunning();
  const began = performance.now();
  let usage = null, timing = null, reason = "", id = "";
  try {
    for await (const event of stream(...body(text), running.signal)) {
      if (event.error) throw new Error(event.error.message);
      id ||= event.id;
      usage = event.usage ?? usage;
      timing = event.timing ?? timing;
      for (const choice of event.choices ?? []) {
        thoughts.append(choice.delta?.reasoning_content ?? "");
        place.append(choice.delta?.content ?? choice.text ?? "");
        reason = choice.finish_reason ?? reason;
      }
      follow();
    }
    conversation.push({ role: "assistant", content: place.textContent });
    showAccount(turn, { usage, timing, reason, id });
  } catch (error) {
    if (error.name === "AbortError") {
      conversation.push({ role: "assistant", content: place.textContent });
      showProblem(turn, `stopped after ${((performance.now() - began) / 1000).toFixed(1)} s`);
    } else {
      conversation.pop();
      showProblem(turn, error.message);
      if ($("prompt").value === "") $("prompt").value = text;
    }
  } finally {
    turn.classList.remove("is-open");
    running = null;
    showRunning();
    $("prompt").focus();
    $("ask").scrollIntoView({ block: "nearest" });
  }
}

// The events of a stream of server-sent events, as objects.
async function* stream(path, asked, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify(asked),
    signal,
  });
  if (!response.ok) throw new Error(await problemOf(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the router answered ${response.status}`;
  }
}

// Keeps what is written in sight, unless its reader has scrolled away. On a narrow screen the whole page scrolls.
function follow() {
  const talk = $("talk");
  if (talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80) talk.scrollTop = talk.scrollHeight;
  if ($("ask").getBoundingClientRect().top < innerHeight + 80) $("ask").scrollIntoView({ block: "nearest" });
}

function showRunning() {
  $("send").disabled = running !== null;
  $("stop").hidden = running === null;
}

function showProblem(turn, text) {
  const problem = turn.querySelector(".problem");
  problem.textContent = text;
  problem.hidden = false;
  follow();
}

// What an answer took: each phase in order, as wide as it was long.
function showAccount(turn, { usage, timing, reason, id }) {
  if (timing === null) return;
  const figure = turn.querySelector(".account");
  const bar = figure.querySelector(".bar");
  const caption = figure.querySelector("figcaption");
  const said = [];
  for (const phase of PHASES) {
    const ms = timing[`${phase}_ms`] ?? 0;
    if (ms <= 0) continue;
    const part = document.createElement("span");
    part.style.flexGrow = ms;
    part.style.background = `var(--${phase})`;
    part.title = `${phase} ${figureOf(ms)} ms`;
    bar.append(part);
    said.push(`${phase} ${figureOf(ms)} ms`);
    caption.append(keyOf(phase, `${phase} ${figureOf(ms)}`));
  }
  bar.setAttribute("aria-label", `Phases: ${said.join(", ")}`);
  const facts = [
    `total ${figureOf(timing.total_ms)} ms`,
    `first token ${figureOf(timing.time_to_first_token_ms)} ms`,
    `${usage.prompt_tokens} in (${usage.prompt_tokens_details?.cached_tokens ?? 0} cached), ${usage.completion_tokens} out`,
  ];
  const generated = usage.completion_tokens - 1;
  if (timing.decode_ms > 0 && generated > 0) facts.push(`${figureOf((generated * 1000) / timing.decode_ms)} tokens/s`);
  if (timing.preemptions > 0) facts.push(`preempted ${timing.preemptions}×`);
  const waits = Object.entries(timing.queue_reason_ms ?? {}).filter(([, ms]) => ms >= 1);
  if (waits.length > 0) facts.push(`waited for ${waits.map(([why, ms]) => `${why} ${figureOf(ms)} ms`).join(", ")}`);
  facts.push(reason, id);
  const line = document.createElement("div");
  line.textContent = facts.join(" · ");
  caption.append(line);
  figure.hidden = false;
  follow();
}

function keyOf(phase, text) {
  const key = document.createElement("span");
  const colour = document.createElement("i");
  key.className = "key";
  colour.style.background = `var(--${phase})`;
  key.append(colour, text);
  return key;
}

function figureOf(value) {
  return value >= 100 ? value.toFixed(0) : value.toFixed(value >= 10 ? 1 : 2);
}

// The cluster.

async function beat() {
  if (!document.hidden) {
    try {
      const response = await fetch("/cluster", { headers: headers() });
      if (!response.ok) throw new Error(await problemOf(response));
      showCluster(await response.json());
    } catch (error) {
      $("state").textContent = error instanceof TypeError ? "the router does not answer" : error.message;
    }
  }
  setTimeout(beat, BEAT_MS);
}

function showCluster(cluster) {
  const sum = (name) => cluster.groups.reduce((total, group) => total + group[name], 0);
  const state = cluster.draining ? "draining" : cluster.groups.length === 0 ? "no worker is ready" : "ready";
  $("state").textContent = `${state} · ${sum("requests_running")} running · ${sum("requests_waiting")} waiting`;
  showModels(cluster.models, cluster.has_chat_template);
  fill($("facts"), [
    ["model", cluster.models[0]],
    ["longest context", `${cluster.max_model_len} tokens`],
    ["at the router", `${cluster.requests_in_flight} requests`],
    ["version", cluster.version],
  ]);
  $("groups").replaceChildren(...cluster.groups.map(groupOf));
}

function showModels(names, hasTemplate) {
  if (settings.model.options.length === names.length) return;
  settings.model.replaceChildren(...names.map((name) => new Option(name, name)));
  if (!hasTemplate) settings.kind.value = "completion";
  settings.kind.options[0].disabled = !hasTemplate;
}

function fill(list, rows) {
  list.replaceChildren(
    ...rows.flatMap(([name, value]) => {
      const term = document.createElement("dt");
      const said = document.createElement("dd");
      term.textContent = name;
      said.textContent = value;
      return [term, said];
    }),
  );
}

function groupOf(group) {
  const place = document.createElement("div");
  place.className = "group";
  const title = document.createElement("p");
  title.textContent = group.group;
  const waits = Object.entries(group.waiting_by_reason).map(([why, count]) => `${count} for ${why}`).join(", ");
  const counts = document.createElement("p");
  counts.textContent = `${group.requests_running} running, ${group.requests_waiting} waiting${waits ? ` (${waits})` : ""}`;
  const blocks = document.createElement("div");
  const total = group.kv_blocks_total;
  const said = `KV blocks: ${group.kv_blocks_referenced} in use, ${group.kv_blocks_cached} cached, ${group.kv_blocks_free} free of ${total}`;
  blocks.className = "bar blocks";
  blocks.setAttribute("role", "img");
  blocks.setAttribute("aria-label", said);
  for (const name of ["referenced", "cached"]) {
    const part = document.createElement("span");
    part.className = name;
    part.style.width = `${(100 * group[`kv_blocks_${name}`]) / total}%`;
    blocks.append(part);
  }
  const legend = document.createElement("p");
  legend.className = "quiet";
  legend.textContent = said;
  place.append(title, counts, blocks, legend);
  return place;
}

beat();
