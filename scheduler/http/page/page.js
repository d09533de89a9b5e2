// What the scheduler does, live. Texts of the server become text and nothing else: no HTML is made of them anywhere.

const KEY = "loadmaster-key"; // in the tab's own storage: it is gone with the tab
const PAST_S = 600;
const DECISIONS = 50;
const ROW = 22; // pixels of the timeline
const ROUTINE = new Set(["queued", "granted"]); // come with each request

const at = (id) => document.getElementById(id);
const runners = new Map(); // by id: the model, and the changes of state in order
let status = null;
let offset = 0; // of this clock from the scheduler's, in seconds
let allowed = false; // to act
let past = []; // decisions that are not shown yet

// -- words ------------------------------------------------------------------------------------------------------------

function bytes(count) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  let value = count;
  for (; Math.abs(value) >= 1023.95 && power < units.length - 1; power += 1) value /= 1024;
  return `${power ? value.toFixed(1).replace(/\.0$/, "") : value} ${units[power]}`;
}

function duration(seconds) {
  if (seconds === null) return "";
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

const sum = (amounts) => Object.values(amounts).reduce((total, amount) => total + amount, 0);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function ending(runner) {
  if (runner.stuck) return "it was stopped, but does not end";
  if (runner.state === "expiring") return runner.leases ? `it leaves after ${plural(runner.leases, "lease")}` : "it leaves";
  if (runner.pinned) return "nothing: it is pinned";
  if (runner.state === "loading") return "";
  if (runner.leases) return "not while it has leases";
  if (runner.expires_in_s === null) return "only memory that others need";
  return `its keep-alive, in ${duration(runner.expires_in_s)}`;
}

function stateOf(runner) {
  const expected = sum(runner.promised_bytes);
  if (runner.state !== "loading" || !expected) return runner.state;
  return `loading ${Math.min(99, Math.floor((100 * sum(runner.resident_bytes)) / expected))} %`;
}

// -- making elements --------------------------------------------------------------------------------------------------

function element(tag, text = "", kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function say(target, text) {
  if (target.textContent !== text) target.textContent = text; // so that a screen reader hears only what is new
}

// Keeps one child for each item, by its key: what has the focus or is open stays so.
function keep(parent, items, keyOf, make, update) {
  const there = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, place) => {
    const key = String(keyOf(item));
    const child = there.get(key) ?? make(item);
    there.delete(key);
    child.dataset.key = key;
    update(child, item);
    if (parent.children[place] !== child) parent.insertBefore(child, parent.children[place] ?? null);
  });
  for (const child of there.values()) child.remove();
}

function cells(row, texts) {
  texts.forEach((text, place) => say(row.children[place], text));
}

function rowOf(kinds) {
  const row = element("tr");
  for (const kind of kinds) row.append(element("td", "", kind));
  return row;
}

// -- what is shown ----------------------------------------------------------------------------------------------------

function showDevices() {
  const shown = status.devices.filter((device) => !device.integrated);
  keep(at("devices"), shown, (device) => device.id, () => {
    const made = element("div");
    made.append(element("p"), element("div", "", "bar"), element("ul", "", "shares"));
    made.children[1].setAttribute("aria-hidden", "true"); // the list below says the same
    return made;
  }, showDevice);
}

function showDevice(made, device) {
  const [head, bar, list] = made.children;
  const parts = status.runners
    .filter((runner) => runner.held_bytes[device.id])
    .map((runner) => ({ key: runner.id, name: runner.model, size: runner.held_bytes[device.id], kind: runner.state }));
  const own = device.held_bytes - parts.reduce((total, part) => total + part.size, 0);
  if (own > 0) parts.push({ key: "own", name: "the program's own", size: own, kind: "other" });
  if (device.missing_bytes) parts.push({ key: "missing", name: "other programs", size: device.missing_bytes, kind: "other" });
  say(head, `${device.id}${device.name && device.name !== device.id ? `, ${device.name}` : ""}: ` +
    `${bytes(device.capacity_bytes)}, of which ${bytes(device.free_bytes)} are free`);
  keep(bar, parts, (part) => part.key, () => element("div"), (piece, part) => {
    const share = part.size / Math.max(1, device.capacity_bytes);
    piece.className = part.kind;
    piece.style.width = `${100 * share}%`;
    piece.title = part.name;
    say(piece, share >= 0.1 ? part.name : "");
  });
  keep(list, parts, (part) => part.key, () => element("li"), (piece, part) => {
    piece.className = part.kind;
    say(piece, `${part.name}: ${bytes(part.size)}`);
  });
}

function showRunners() {
  keep(at("runners"), status.runners, (runner) => runner.id, (runner) => {
    const row = rowOf(["", "", "number", "number", "", ""]);
    const expire = element("button", "Expire");
    const pin = element("button", "Pin");
    expire.addEventListener("click", () => act("expire", { runner: runner.id }, runner.model));
    pin.addEventListener("click", () => act(pin.textContent.toLowerCase(), { runner: runner.id }, runner.model));
    row.lastChild.append(expire, pin);
    return row;
  }, (row, runner) => {
    const held = Object.entries(runner.held_bytes).filter(([, size]) => size);
    const memory = held.map(([device, size]) => `${bytes(size)} of ${device}`).join(", ");
    cells(row, [runner.model, stateOf(runner), String(runner.leases), memory, ending(runner)]);
    row.children[4].classList.toggle("alarm", runner.stuck);
    const [expire, pin] = row.lastChild.children;
    say(pin, runner.pinned ? "Unpin" : "Pin");
    expire.setAttribute("aria-label", `Expire ${runner.model}`);
    pin.setAttribute("aria-label", `${pin.textContent} ${runner.model}`);
    expire.disabled = !allowed || runner.state === "expiring";
    pin.disabled = !allowed;
  });
}

function showQueue() {
  const kinds = ["number", "", "", "number", "number", "number"];
  keep(at("queue"), status.queue, (wait) => wait.id, () => rowOf(kinds), (row, wait) => {
    const times = [wait.waited_s, wait.until_s, wait.gives_up_in_s].map(duration);
    cells(row, [String(wait.position + 1), wait.model, wait.waits_for, ...times]);
  });
}

function change(id, model, moment, state) {
  if (!runners.has(id)) runners.set(id, { model, changes: [] });
  runners.get(id).changes.push([moment, state]);
}

function svg(tag, values, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(values)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

// The spans of a runner's states; those that are too short to be seen are part of the one before.
function spans(changes, begin, now, shortest) {
  const found = [];
  changes.forEach(([moment, state], place) => {
    const end = changes[place + 1]?.[0] ?? now;
    const last = found.at(-1);
    if (state === "unloaded" || end < begin) return;
    if (last && (last.state === state || end - moment < shortest)) last.end = end;
    else found.push({ state, start: Math.max(begin, moment), end });
  });
  return found;
}

function showTimeline() {
  const now = Date.now() / 1000 - offset;
  const begin = now - PAST_S;
  const place = at("timeline");
  const width = Math.max(200, place.clientWidth);
  const left = Math.min(180, width / 3);
  const x = (moment) => left + ((width - left) * (moment - begin)) / PAST_S;
  for (const [id, { changes }] of runners) {
    const [moment, state] = changes.at(-1);
    if (state === "unloaded" && moment < begin) runners.delete(id);
    else if (changes.length > 5000) changes.splice(0, 1000);
  }
  const height = ROW * (runners.size + 1);
  const words = `states of ${plural(runners.size, "runner")} in the last ten minutes`;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": words });
  for (let minutes = 0; minutes <= 10; minutes += 2) {
    const mark = x(now - 60 * minutes);
    picture.append(svg("line", { x1: mark, x2: mark, y1: 0, y2: height - ROW + 4 }));
    const anchor = minutes === 0 ? "end" : "middle";
    const word = minutes === 0 ? "now" : `−${minutes} min`;
    picture.append(svg("text", { x: mark, y: height - 4, "text-anchor": anchor }, word));
  }
  [...runners].forEach(([id, { model, changes }], row) => {
    const letters = Math.floor(left / 8);
    const name = model.length > letters ? `…${model.slice(1 - letters)}` : model;
    picture.append(svg("text", { x: 0, y: ROW * row + 15 }, name));
    for (const { state, start, end } of spans(changes, begin, now, PAST_S / (width - left))) {
      const size = { x: x(start), y: ROW * row + 4, width: Math.max(1, x(end) - x(start)), height: ROW - 8 };
      const piece = svg("rect", { ...size, class: state });
      piece.append(svg("title", {}, `runner ${id} of ${model}: ${state} for ${duration(end - start)}`));
      picture.append(piece);
    }
  });
  place.replaceChildren(picture);
}

const WORDS = {
  waits: "waits", evicts: "evicts", placed: "is placed:", launched: "is started", prefetched: "reads ahead",
  rejected: "is refused:", measured: "was measured:", "backs off": "backs off:",
};

function decide(decision) {
  if (ROUTINE.has(decision.what)) return;
  let subject = decision.model;
  if (decision.request !== null) subject = `request ${decision.request} for ${decision.model}`;
  else if (decision.runner !== null) subject = `runner ${decision.runner} of ${decision.model}`;
  const item = element("li");
  const moment = new Date((decision.at + offset) * 1000);
  const time = element("time", moment.toLocaleTimeString());
  time.dateTime = moment.toISOString();
  item.append(time, element("span", ` ${subject} ${WORDS[decision.what] ?? decision.what} ${decision.reason}`));
  if (decision.runners.length + decision.devices.length) item.append(candidates(decision));
  at("decisions").prepend(item);
  while (at("decisions").children.length > DECISIONS) at("decisions").lastChild.remove();
}

function candidates(decision) {
  const found = element("details");
  const table = element("table");
  const body = element("tbody");
  for (const one of decision.runners) {
    const row = rowOf(["", "", "number", ""]);
    const cost = one.cost_s === null ? "" : `, costs ${one.cost_s.toFixed(1)} s`;
    cells(row, [`runner ${one.runner} of ${one.model}`, `${one.state}, ${plural(one.leases, "lease")}${cost}`,
      bytes(sum(one.held_bytes)), one.taken ? "is evicted" : one.reason]);
    body.append(row);
  }
  for (const one of decision.devices) {
    const row = rowOf(["", "", "number", ""]);
    cells(row, [one.device, `${bytes(one.needed_bytes)} are needed`, `${bytes(one.free_bytes)} free`,
      one.taken ? "is used" : one.reason]);
    body.append(row);
  }
  table.append(body);
  found.append(element("summary", `${plural(decision.runners.length + decision.devices.length, "candidate")}`), table);
  return found;
}

function showStatus(told) {
  status = told;
  offset = Date.now() / 1000 - told.at;
  keep(at("problems"), told.problems, (problem) => problem, () => element("li"), say);
  showDevices();
  showRunners();
  showQueue();
  showTimeline();
}

// -- talking to the server --------------------------------------------------------------------------------------------

function ask(path, more = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...more.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  return fetch(path, { cache: "no-store", ...more, headers });
}

async function act(action, body, name) {
  say(at("message"), `${action} ${name}: asked for`);
  try {
    const headers = { "Content-Type": "application/json" };
    const answer = await ask(`loadmaster/${action}`, { method: "POST", headers, body: JSON.stringify(body) });
    const told = await answer.json();
    say(at("message"), `${action} ${name}: ${answer.ok ? told.status : told.error.message}`);
  } catch (error) {
    say(at("message"), `${action} ${name}: no answer (${error.message})`);
  }
}

async function listModels() {
  const answer = await ask("v1/models");
  if (!answer.ok) return;
  const names = (await answer.json()).data.map((model) => model.id);
  keep(at("model"), names, (name) => name, () => element("option"), (option, name) => {
    say(option, name);
    option.value = name;
  });
}

const HEARD = {
  past(told) {
    runners.clear();
    at("decisions").replaceChildren();
    for (const one of told.runners) runners.set(one.runner, { model: one.model, changes: one.changes });
    allowed = told.actions;
    at("load-form").querySelector("button").disabled = !allowed;
    say(at("actions-note"), allowed ? "" : "the server takes no actions without a key");
    past = told.decisions; // their times need the first status
  },
  status(told) {
    showStatus(told);
    past.splice(0).forEach(decide);
  },
  transition(told) {
    change(told.runner, told.model, told.at, told.destination);
  },
  decision(told) {
    decide(told);
  },
  gap(told) {
    at("decisions").prepend(element("li", `${told.missed} events came too fast to be shown`));
  },
};

async function follow(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const [head, ...rest] = part.split("\n");
      const data = rest.join("\n").slice("data: ".length);
      HEARD[head.slice("event: ".length)]?.(JSON.parse(data));
    }
  }
}

let current = null; // what ends the connection, to begin another with another key

async function stay() {
  for (let wait = 1; ; wait = Math.min(10, 2 * wait)) {
    current = new AbortController();
    let told = "the connection is lost";
    try {
      const answer = await ask("events", { signal: current.signal });
      if (answer.status === 401) {
        told = "the server asks for a key";
        if (document.activeElement === document.body) at("key").focus();
      } else if (answer.ok) {
        wait = 1;
        say(at("connection"), "live");
        await Promise.all([follow(answer.body), listModels()]);
      } else {
        told = (await answer.json()).error.message;
      }
    } catch (error) {
      if (current.signal.aborted) {
        wait = 0.05;
        told = "connecting";
      }
    }
    say(at("connection"), told);
    await new Promise((resolve) => {
      setTimeout(resolve, 1000 * wait);
      if (told === "the server asks for a key") at("key-form").addEventListener("submit", resolve, { once: true });
    });
  }
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  at("key").value = "";
  current?.abort();
});
at("load-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const model = at("model").value;
  if (model) act("load", { model }, model);
});
at("model").addEventListener("focus", listModels);
addEventListener("resize", () => status && showTimeline());
stay();
