"use strict";
// The page: asks for the data every few seconds and draws it.
// Names and reasons were typed by people: text goes in as text, never as HTML.

const RANGES = [["15 min", 900], ["6 h", 21600], ["7 d", 604800]];
const SECONDS = 5;
const $ = (id) => document.getElementById(id);
const page = { chosen: "", range: 900, names: [], user: "", mayRollBack: false, cards: new Map(), busy: false, seen: 0 };

// --- Airflow's theme, live where the page is inside Airflow -----------------------------------------------

function dark() {
  const chosen = localStorage.getItem("theme");
  return chosen === "dark" || (chosen !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
}

function paint() { document.documentElement.classList.toggle("dark", dark()); }

paint();
addEventListener("storage", paint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

// --- data ----------------------------------------------------------------------------------------------------

class Failure extends Error {}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
  } catch {
    throw new Failure("Airflow does not answer");
  }
  if (answer.ok) return answer.json();
  const said = await answer.json().catch(() => ({}));
  if (answer.status === 401) throw new Failure("your session has ended: sign in to Airflow again");
  throw new Failure(`${answer.status}: ${typeof said.detail === "string" ? said.detail : JSON.stringify(said)}`);
}

async function refresh() {
  if (page.busy || document.hidden) return;
  page.busy = true;
  try {
    const found = await ask("api/workloads");
    Object.assign(page, { names: found.workloads, user: found.user, mayRollBack: found.may_roll_back });
    menus();
    const shown = page.names.filter((name) => !page.chosen || name === page.chosen);
    for (const name of [...page.cards.keys()]) if (!shown.includes(name)) drop(name);
    await Promise.all(shown.map(show));
    if (!shown.length) $("main").replaceChildren(make("p", { class: "card empty" }, "There is no workload that you may see."));
    page.seen = Date.now();
    tell(`updated ${new Date().toLocaleTimeString("en-GB")}`, false);
  } catch (error) {
    const since = page.seen ? `; shown is what was at ${new Date(page.seen).toLocaleTimeString("en-GB")}` : "";
    tell(`${error.message}${since}`, true);
    if (!(error instanceof Failure)) console.error(error);
  } finally {
    page.busy = false;
  }
}

function tell(text, bad) {
  $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
}

// --- elements ------------------------------------------------------------------------------------------------

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node[key] = value;
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const badge = (text, kind = "") => make("span", { class: `badge ${kind}` }, text);
const row = (cell, values) => make("tr", {}, ...values.map(([text, kind]) => make(cell, { class: kind || null }, text)));
const table = (head, rows) => make("div", { class: "scroll" }, make("table", {}, make("thead", {}, row("th", head)), make("tbody", {}, ...rows)));

function when(text) {
  const time = new Date(text), today = time.toDateString() === new Date().toDateString();
  const clock = time.toLocaleTimeString("en-GB");
  return today ? clock : `${time.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${clock.slice(0, 5)}`;
}

const percent = (ratio) => ratio === null || ratio === undefined ? "–" : `${+(ratio * 100).toFixed(ratio && ratio < 0.1 ? 2 : 1)} %`;
const milliseconds = (value) => value === null || value === undefined ? "–" : value >= 1000 ? `${+(value / 1000).toFixed(2)} s` : `${+value.toPrecision(3)} ms`;
const number = (value) => value === null || value === undefined ? "–" : value >= 100 ? String(Math.round(value)) : String(+value.toFixed(value < 1 ? 2 : 1));

function choice(parent, items, chosen, choose) {
  const signature = JSON.stringify([items, chosen]);
  if (parent.dataset.shown === signature) return; // A new element would lose the focus.
  parent.dataset.shown = signature;
  parent.replaceChildren(...items.map(([text, value]) =>
    make("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => choose(value) }, text)));
}

function menus() {
  choice($("workloads"), [["All", ""], ...page.names.map((name) => [name, name])], page.chosen, (name) => {
    location.hash = name;
  });
  choice($("ranges"), RANGES, page.range, (range) => {
    page.range = range;
    for (const card of page.cards.values()) card.points = null;
    menus();
    refresh();
  });
}

// --- a workload ----------------------------------------------------------------------------------------------

function drop(name) {
  page.cards.get(name).node.remove();
  page.cards.delete(name);
}

async function show(name) {
  const card = page.cards.get(name) || add(name);
  const base = `api/workloads/${encodeURIComponent(name)}`;
  // A week changes slowly and is long to read.
  const due = !card.points || Date.now() - card.readAt >= (page.range > 3600 ? 60_000 : 0);
  const range = page.range;
  const [found, series] = await Promise.all([ask(base), due ? ask(`${base}/series?seconds=${range}`) : null]);
  if (series && range === page.range) Object.assign(card, { points: series.points, readAt: Date.now() });
  card.found = found;
  render(card);
}

function add(name) {
  const part = () => make("div");
  const card = { name, head: part(), rollout: part(), services: part(), history: part(), figures: [], open: false };
  card.charts = make("div", { class: "charts" });
  for (let index = 0; index < 4; index += 1) card.figures.push(card.charts.appendChild(make("figure")));
  const parts = [card.head, card.rollout, card.services, card.charts, card.history];
  card.node = make("section", { class: "card", id: `workload-${name}`, "aria-label": name }, ...parts);
  page.cards.set(name, card);
  $("main").querySelector(".empty")?.remove();
  const after = [...page.cards.values()].filter((other) => other.name > name && other.node.isConnected);
  $("main").insertBefore(card.node, after.sort((a, b) => (a.name < b.name ? -1 : 1))[0]?.node || null);
  return card;
}

function render(card) {
  const { found } = card;
  card.keys = keys(card);
  update(card, "head", found, () => head(card));
  update(card, "rollout", found.rollout, () => rollout(found.rollout));
  update(card, "services", [found.services, last(card)], () => services(card));
  update(card, "history", [found.history, card.open], () => history(card));
  charts(card);
}

// Only what changed is drawn again: a selection or a focus elsewhere stays.
function update(card, name, data, build) {
  const signature = JSON.stringify(data ?? null);
  card.shown ||= {};
  if (card.shown[name] === signature) return;
  card.shown[name] = signature;
  card[name].replaceChildren(...[build()].flat().filter(Boolean));
}

const last = (card) => {
  const point = card.points?.[card.points.length - 1];
  return point && Date.now() / 1000 - point.at < 60 + page.range / 60 ? point.services : {};
};

// A version keeps its colour: by its number, and the next free one where two would be the same.
function keys(card) {
  const names = new Set([...card.found.services.map((each) => each.service), ...(card.points || []).flatMap((point) => Object.keys(point.services))]);
  const known = [...names].map((name) => [name, version(card, name)]).sort((a, b) => Number(a[1]) - Number(b[1]) || (a[0] < b[0] ? -1 : 1));
  const taken = new Set(), found = {};
  for (const [name, label] of known) {
    let key = (Number(label) || 0) % 6;
    while (taken.has(key) && taken.size < 6) key = (key + 1) % 6;
    taken.add(key);
    found[name] = key;
  }
  return found;
}

function version(card, service) {
  return card.found.versions[service] || service.slice(card.name.length + 1, card.name.length + 9);
}

function head(card) {
  const { found } = card, active = found.rollout?.active;
  const serves = found.champion
    ? [badge(`champion: version ${found.champion}`, "good"), make("span", { class: "hint" }, `serves since ${when(found.serving_since)}`)]
    : [badge("no champion yet")];
  if (active) serves.push(badge(`rollout of version ${found.rollout.version}`, "info"));
  if (found.in_progress) serves.push(badge(found.in_progress, "warn"));
  // A first version's rollout has nothing to go back to either.
  const may = page.mayRollBack && (found.served.length > 0 || (active && Boolean(found.champion)));
  const why = !page.mayRollBack ? "Your role may not trigger the DAG rollback" : may ? null : "No other version ever served";
  const button = make("button", { type: "button", class: "danger", disabled: !may, title: why, onclick: () => openDialog(card) }, "Roll back…");
  return make("div", { class: "head" }, make("h2", {}, card.name), ...serves, make("div", { class: "actions" }, button));
}

function rollout(found) {
  if (!found) return [];
  const failed = ["failed", "inconclusive", "aborted", "abandoned"].includes(found.outcome);
  const kinds = { promoted: "good", failed: "bad", inconclusive: "warn", aborted: "bad", abandoned: "warn" };
  const state = found.outcome || (found.phase === "passed" ? "passed, promotion follows" : "running");
  const title = make("div", {}, make("b", {}, `${found.active ? "Rollout" : "Last rollout"}: version ${found.version} `),
    badge(state, kinds[found.outcome] || "info"),
    make("span", { class: "hint" }, ` by ${found.actor}, begun ${when(found.began_at * 1000)}${found.why ? ` · ${found.why}` : ""}`));
  if (!found.active) return make("div", { class: "rollout" }, title);
  const stages = found.stages.map((name, index) => {
    const here = index === found.stage;
    const done = index < found.stage || found.phase === "passed";
    const kind = here && failed ? "failed" : done ? "done" : here ? "now" : "";
    return make("li", { class: kind, "aria-current": here ? "step" : null }, name.replace(/^canary-(\d+)$/, "canary $1 %"));
  });
  const step = found.history[found.history.length - 1];
  return make("div", { class: "rollout" }, title, make("ol", { class: "stages" }, ...stages),
    step && make("p", { class: "hint" }, `${when(step.at * 1000)} ${step.stage}: ${step.text}`));
}

const ROLES = { champion: "good", candidate: "info", shadow: "warn", standby: "" };

function services(card) {
  const rates = last(card), found = card.found.services;
  if (!found.length) return make("p", { class: "empty" }, "Nothing serves this workload.");
  const bar = make("div", { class: "bar", role: "img", "aria-label": "shares of the traffic" });
  for (const each of found.filter((one) => one.traffic_ratio > 0)) {
    const part = make("div", { class: `k${card.keys[each.service]}` });
    part.style.flexGrow = each.traffic_ratio;
    bar.append(part);
  }
  const rows = found.map((each) => {
    const rate = rates[each.service] || {};
    const name = make("span", { title: each.service }, make("span", { class: `dot k${card.keys[each.service]}` }), `version ${version(card, each.service)}`);
    return row("td", [[name, "nowrap"], [badge(each.role, ROLES[each.role])], [percent(each.traffic_ratio), "num"], [String(each.replicas), "num"],
      [number(rate.requests_per_second), "num"], [percent(rate.error_ratio), "num"], [milliseconds(rate.p50_ms), "num"], [milliseconds(rate.p99_ms), "num"]]);
  });
  const titles = ["Traffic", "Replicas", "Requests/s", "Errors", "p50", "p99"].map((title) => [title, "num"]);
  return [bar, table([["Service"], ["Role"], ...titles], rows)];
}

function charts(card) {
  if (!card.points) return;
  card.charts.hidden = !Object.keys(card.keys).length;
  const end = Date.now() / 1000, start = end - page.range, times = card.points.map((point) => point.at);
  const names = Object.keys(card.keys).sort((a, b) => Number(version(card, a)) - Number(version(card, b)));
  const lines = (field, more = {}) => names.map((name) => ({ name: `version ${version(card, name)}${more.mark || ""}`, key: card.keys[name], ...more,
    values: card.points.map((point) => point.services[name]?.[field] ?? null) }));
  const base = { times, start, end, gap: Math.max(20, page.range / 60, page.range > 43200 ? 900 : 0), hint: "" };
  const digits = (step) => Math.max(0, Math.min(4, Math.ceil(-Math.log10(step) - 1e-9)));
  const plain = (value, step) => value.toFixed(step === 2.5 ? 1 : digits(step));
  const ratio = (value, step) => `${(value * 100).toFixed(Math.max(0, digits(step) - 2 + (String(step).includes("25") ? 1 : 0)))} %`;
  const time = (value, step) => value >= 1000 ? `${value / 1000} s` : `${plain(value, step)} ms`;
  const drawn = [
    { title: "Latency", hint: "p99, dashed p50", lines: [...lines("p99_ms", { mark: " p99" }), ...lines("p50_ms", { dashed: true, mark: " p50" })], atLeast: 1, format: time, tell: milliseconds },
    { title: "Errors", hint: "share of requests without a good answer", lines: lines("error_ratio"), atLeast: 0.01, format: ratio, tell: percent },
    { title: "Requests", hint: "per second, copies to a shadow included", lines: lines("requests_per_second"), atLeast: 1, format: plain, tell: number },
    { title: "Traffic", hint: "share by version", lines: stacked(card, names), top: 1, format: (value) => `${Math.round(value * 100)} %`, tell: percent },
  ];
  drawn.forEach((chart, index) => Charts.draw(card.figures[index], { ...base, ...chart }));
}

function stacked(card, names) {
  const below = card.points.map(() => 0);
  return names.map((name) => ({ name: `version ${version(card, name)}`, key: card.keys[name], area: true,
    values: card.points.map((point, index) => {
      const share = point.services[name]?.traffic_ratio || 0;
      if (!share) return null;
      const low = below[index];
      below[index] = low + share;
      return [low, below[index]];
    }) }));
}

const STATES = { open: "info", committed: "good", undone: "bad" };

function history(card) {
  const all = card.found.history, shown = card.open ? all : all.slice(0, 8);
  if (!all.length) return [make("h3", {}, "History"), make("p", { class: "empty" }, "The ledger has no row of this workload.")];
  const rows = shown.map((each) => {
    const what = each.previous && each.previous !== each.version ? `${each.version || "none"} (was ${each.previous})` : each.version || "–";
    const why = make("span", {}, each.reason || "–", each.outcome && make("div", { class: "hint" }, `undone: ${each.outcome}`));
    return row("td", [[make("time", { datetime: each.at, title: each.at }, when(each.at)), "nowrap"], [each.action, "nowrap"], [what, "nowrap"], [each.actor, "nowrap"], [why, "reason"],
      [badge(each.state, STATES[each.state])]]);
  });
  const more = all.length > 8 && make("button", { type: "button", class: "link", onclick: () => { card.open = !card.open; render(card); } },
    card.open ? "Show fewer" : `Show ${all.length - 8} more`);
  return [make("h3", {}, "History"), table([["Time"], ["Action"], ["Version"], ["By whom"], ["Reason"], ["State"]], rows), more];
}

// --- begin ---------------------------------------------------------------------------------------------------

function readHash() {
  page.chosen = decodeURIComponent(location.hash.slice(1));
  menus();
  refresh();
}

addEventListener("hashchange", readHash);
document.addEventListener("visibilitychange", refresh);
let resizing;
addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => page.cards.forEach(charts), 150); });
readHash();
setInterval(refresh, SECONDS * 1000);
