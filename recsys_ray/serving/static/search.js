// The search page. Everything shown comes from this service, as text, never as markup.

import {shrunk} from "./pictures.js";

const SYSTEMS = {
  bm25: ["Words alone", "BM25"],
  retriever: ["Retrieval", "words and meaning, fused"],
  full: ["Full graph", "retrieval, cross-encoder, ranker"],
};
const FACETS = ["category", "brand", "concern"];
const FILTERS = [...FACETS, "price_min", "price_max"];
const PAGE = {list: 24, compare: 10};
const STAGE_NAMES = {encode: "encode", shards: "retrieve", rank: "fuse", rows: "fetch", cross_encoder: "cross-encoder",
                     ranker: "rank"};

const at = (id) => document.getElementById(id);
const imageHosts = document.querySelector("meta[name=image-hosts]").content.split(" ").filter(Boolean);
const ownImages = document.querySelector("meta[name=own-images]").content === "True";
const pictures = document.querySelector("meta[name=pictures]").content === "True";
let beside = null;                  // what is asked beside the words: {picture, preview}, or {like, title} of a product
let running = new AbortController();
let shown = 0;                      // results in the list so far

// --- small builders --------------------------------------------------------------------------------------------------
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null));
  return element;
}

function number(value, digits = 3) {
  return Math.abs(value) >= 1000 ? value.toFixed(0) : Number(value.toPrecision(digits)).toString();
}

const mode = () => document.querySelector("input[name=mode]:checked").value;

function hue(text) {
  let sum = 0;
  for (const letter of text) sum = (sum * 31 + letter.codePointAt(0)) % 360;
  return sum;
}

// --- a result --------------------------------------------------------------------------------------------------------
function picture(item) {
  const title = item.title || item.product_id;
  const words = title.match(/[\p{L}\p{N}]+/gu) || ["?"];
  const letters = words.slice(0, 2).map((word) => [...word][0].toUpperCase()).join("");
  const frame = make("div", "picture", letters);
  frame.setAttribute("aria-hidden", "true");
  frame.style.setProperty("--hue", hue(item.category || item.brand || title));
  const source = imageSource(item.image_url);
  if (source) {
    const image = make("img");
    image.loading = "lazy";
    image.alt = "";
    image.referrerPolicy = "no-referrer";
    image.addEventListener("error", () => frame.replaceChildren(letters));
    image.src = source;
    frame.replaceChildren(image);
  }
  return frame;
}

function imageSource(url) {
  if (!url) return null;
  if (imageHosts.some((host) => url.startsWith(`${host}/`))) return url;
  if (!ownImages || url.startsWith("/") || /^[a-z][a-z0-9+.-]*:/i.test(url)) return null;
  return `product-images/${url.split("/").map(encodeURIComponent).join("/")}`;
}

function meta(item) {
  const line = make("p", "meta");
  const parts = [];
  if (item.price !== null) parts.push(make("span", "price", item.price.toFixed(2)));
  if (item.rating !== null) {
    const stars = make("span", "stars", "★".repeat(Math.round(item.rating)) + "☆".repeat(5 - Math.round(item.rating)));
    stars.setAttribute("aria-label", `${item.rating} of 5`);
    stars.setAttribute("role", "img");
    parts.push(make("span", "", stars, ` ${item.rating.toFixed(1)}${item.num_reviews ? ` (${item.num_reviews})` : ""}`));
  }
  for (const text of [item.brand, item.category]) if (text) parts.push(make("span", "", text));
  parts.forEach((part, place) => line.append(...(place ? [" · ", part] : [part])));
  return line;
}

function movement(item) {
  const why = item.explanation;
  if (!why || why.first_rank === item.rank) return null;
  const up = why.first_rank > item.rank;
  const text = make("span", `move ${up ? "up" : "down"}`, `${up ? "▲" : "▼"}${Math.abs(why.first_rank - item.rank)}`);
  text.title = `retrieval had it at ${why.first_rank}`;
  return text;
}

const readable = (feature) => feature.replaceAll("_", " ");

function gist(item) {
  const why = item.explanation;
  if (!why) return null;
  const parts = why.features.length
    ? why.features.slice(0, 3).map((one) => `${readable(one.feature)} ${one.contribution > 0 ? "+" : "−"}`)
    : Object.entries(why.scores).map(([name, score]) => `${readable(name)} ${number(score)}`);
  return make("p", "gist", parts.join(", "));
}

function concernLine(one) {
  const because = one.because.length ? ` because of ${one.because.join(", ")}` : "";
  return make("p", "concern", make("strong", "", one.concern), ` (${number(one.probability, 2)})${because}`);
}

function whyPanel(why) {
  const panel = make("div", "why");
  if (why.concerns.length) panel.append(make("h3", "", "Good for"), ...why.concerns.map(concernLine));
  const scores = make("dl");
  for (const [name, score] of Object.entries(why.scores))
    scores.append(make("dt", "", readable(name)), make("dd"), make("dd", "", number(score, 4)));
  panel.append(make("h3", "", `Scores (retrieval had it at ${why.first_rank})`), scores);
  if (why.features.length) {
    const most = Math.max(...why.features.map((one) => Math.abs(one.contribution)));
    const list = make("dl");
    for (const one of why.features) {
      const bar = make("div", one.contribution < 0 ? "effect less" : "effect");
      bar.style.setProperty("--share", Math.abs(one.contribution) / most);
      const value = one.value === null ? "unknown" : number(one.value);
      const effect = `${one.contribution > 0 ? "+" : "−"}${number(Math.abs(one.contribution))}`;
      list.append(make("dt", "", readable(one.feature)), make("dd", "", bar), make("dd", "value", `${value} → ${effect}`));
    }
    panel.append(make("h3", "", "What moved it"), list);
  }
  return panel;
}

function card(item, listId) {
  const element = make("li", "card", picture(item),
    make("div", "", make("h3", "title", make("span", "rank", `${item.rank} `), item.title || item.product_id), meta(item)));
  const moved = movement(item);
  if (moved) element.querySelector(".meta").append(" · ", moved);
  const line = gist(item);
  if (line) element.append(line);
  if (pictures) element.children[1].append(alikeButton(item));
  element.tabIndex = -1;
  element.dataset.id = item.product_id;
  element.setAttribute("role", "button");
  element.setAttribute("aria-expanded", "false");
  element.addEventListener("click", (event) => { if (!event.target.closest(".why")) toggle(element, item, listId); });
  for (const [event, on] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]])
    element.addEventListener(event, () => highlight(item.product_id, on));
  return element;
}

function alikeButton(item) {
  const button = make("button", "plain alike", "Similar looking");
  button.type = "button";
  button.setAttribute("aria-label", `Similar looking to ${item.title || item.product_id}`);
  button.addEventListener("click", (event) => {
    event.stopPropagation();
    at("query").value = "";
    ask({like: item.product_id, title: item.title || item.product_id});
  });
  return button;
}

function toggle(element, item, listId) {
  const open = element.querySelector(".why");
  if (open) open.remove();
  else if (item.explanation) element.append(whyPanel(item.explanation));
  element.setAttribute("aria-expanded", String(!open));
  if (!open && listId) {
    const event = {kind: "click", product_id: item.product_id, list_id: listId};
    post("v1/events", {events: [event]}, undefined).catch(() => {});
  }
}

function highlight(id, on) {
  if (mode() !== "compare") return;
  for (const one of document.querySelectorAll(".card")) one.classList.toggle("same", on && one.dataset.id === id);
}

// --- an answer -------------------------------------------------------------------------------------------------------
function latency(tookMs) {
  const box = make("div", "time"), bar = make("div", "bar"), legend = make("div", "legend");
  const stages = Object.entries(tookMs);
  stages.forEach(([name, took], place) => {
    const color = `var(--s${place % 7 + 1})`;
    const part = make("i"), dot = make("i");
    part.style.setProperty("--part", color);
    part.style.setProperty("--share", Math.max(took, 0.01));
    dot.style.setProperty("--part", color);
    bar.append(part);
    legend.append(make("span", "", dot, `${STAGE_NAMES[name] || name} ${took.toFixed(took < 10 ? 1 : 0)} ms`));
  });
  box.append(bar, legend);
  return box;
}

function notice(answer) {
  const {degraded, degraded_stage: stage, shards_answered: answered, shards_total: total} = answer;
  if (degraded) return make("p", "notice", `The ${readable(stage)} was left out: it was late or failed.`);
  return answered < total ? make("p", "notice", `${answered} of ${total} parts of the catalogue answered.`) : null;
}

function column(system, answer) {
  const [name, what] = SYSTEMS[system];
  const total = Object.values(answer.took_ms).reduce((sum, one) => sum + one, 0);
  return make("section", "system", make("h2", "", name), make("p", "", `${what} · ${total.toFixed(0)} ms`),
              latency(answer.took_ms), notice(answer),
              make("ol", "cards", ...answer.items.map((item) => card(item, answer.list_id))));
}

function list(answer) {
  const cards = make("ol", "cards", ...answer.items.map((item) => card(item, answer.list_id)));
  return make("section", "system", latency(answer.took_ms), notice(answer), cards);
}

function fillFacet(name, counts) {
  const select = at(name), chosen = select.value;
  const options = counts.map(({value, count}) => new Option(`${value} (${count})`, value));
  if (chosen && !counts.some(({value}) => value === chosen)) options.unshift(new Option(chosen, chosen));
  select.replaceChildren(new Option("all", ""), ...options);
  select.value = chosen;
}

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

// --- asking ----------------------------------------------------------------------------------------------------------
async function post(path, body, signal) {
  return called(path, {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body), signal});
}

async function called(path, options) {
  const key = sessionStorage.getItem("key");
  if (key) options.headers = {...options.headers, authorization: `Bearer ${key}`};
  const response = await fetch(path, options);
  const answer = await response.json();
  if (response.ok) return answer;
  at("keyform").hidden = response.status !== 401;
  throw new Error(response.status === 429 ? "Too many requests at the moment; try again." : answer.error.message);
}

function request(system, offset) {
  const filters = {};
  for (const name of FACETS) if (at(name).value) filters[name] = [at(name).value];
  for (const name of ["price_min", "price_max"]) if (at(name).value) filters[name] = Number(at(name).value);
  const words = at("query").value, page = {k: PAGE[mode()], offset, sort: at("sort").value, filters, explain: true};
  if (!beside) return {query: words, system, ...page};
  return {picture: beside.picture, query: words.trim() ? words : null, ...page};
}

async function answered(system, offset, signal) {
  if (!beside?.like) return post("v1/search", request(system, offset), signal);
  const path = `v1/products/${encodeURIComponent(beside.like)}/similar?by=looks&k=${PAGE.list}`;
  const answer = await called(path, {signal});
  return {...answer, candidates: answer.items.length, facets: null};
}

function ask(what) {
  beside = what;
  if (what) document.querySelector("input[value=list]").checked = true;
  at("asked").hidden = !what;
  at("preview").hidden = !what?.preview;
  if (what?.preview) at("preview").src = what.preview;
  at("asked_text").textContent = what?.like ? `looks like ${what.title}` : "";
  search();
}

async function search() {
  running.abort();
  running = new AbortController();
  const signal = running.signal, results = at("results"), side = mode() === "compare" && !beside;
  remember();
  if (beside?.like && at("query").value.trim()) return ask(null);     // words begin a search of their own
  if (!at("query").value.trim() && !beside) {
    results.replaceChildren();
    at("welcome").hidden = false;
    at("filters").hidden = true;
    say("");
    return;
  }
  say("Searching …");
  try {
    const systems = side ? Object.keys(SYSTEMS) : ["full"];
    const answers = [];     // one after the other: side by side they would slow each other down
    for (const system of systems) answers.push(await answered(system, 0, signal));
    const last = answers.at(-1);
    at("welcome").hidden = true;
    at("filters").hidden = !last.facets;
    at("keyform").hidden = true;
    for (const name of last.facets ? FACETS : []) fillFacet(name, last.facets[name]);
    at("concern").parentElement.hidden = at("concern").options.length < 2;     // nothing here was scored
    results.classList.toggle("compare", side);
    results.replaceChildren(...answers.map((answer, place) => side ? column(systems[place], answer) : list(answer)));
    shown = last.items.length;
    if (!side) more(last, signal);
    const first = results.querySelector(".card");
    if (first) first.tabIndex = 0;
    if (!last.items.length) say("Nothing found. Fewer filters or other words may help.");
    else say(side ? "" : `${last.candidates} products ranked`);
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
}

function more(answer, signal) {
  if (!answer.items.length || shown >= answer.candidates) return;
  const button = make("button", "more", "More");
  button.type = "button";
  button.addEventListener("click", async () => {
    try {
      const next = await post("v1/search", request("full", shown), signal);
      shown += next.items.length;
      const cards = next.items.map((item) => card(item, next.list_id));
      document.querySelector(".cards").append(...cards);
      button.remove();
      if (cards.length) focusCard(cards[0]);
      more(next, signal);
    } catch (error) {
      if (error.name !== "AbortError") say(error.message, true);
    }
  });
  at("results").append(button);
}

// --- the address says what is shown ----------------------------------------------------------------------------------
function remember() {
  const said = new URLSearchParams();
  if (at("query").value) said.set("q", at("query").value);
  for (const name of FILTERS) if (at(name).value) said.set(name, at(name).value);
  if (at("sort").value !== "relevance") said.set("sort", at("sort").value);
  if (mode() !== "list") said.set("mode", mode());
  history.replaceState(null, "", `${location.pathname}${said.size ? `?${said}` : ""}`);
}

function recall() {
  const said = new URLSearchParams(location.search);
  at("query").value = said.get("q") || "";
  for (const name of [...FILTERS, "sort"]) {
    const value = said.get(name);
    if (!value) continue;
    if (FACETS.includes(name)) at(name).add(new Option(value, value));
    at(name).value = value;
  }
  if (said.get("mode") === "compare") document.querySelector("input[value=compare]").checked = true;
}

// --- keys ------------------------------------------------------------------------------------------------------------
function focusCard(element) {
  for (const one of document.querySelectorAll(".card")) one.tabIndex = -1;
  element.tabIndex = 0;
  element.focus();
}

function neighbour(from, key) {
  const cards = [...document.querySelectorAll(".card")];
  if (!from) return cards[0];
  const here = from.getBoundingClientRect(), place = cards.indexOf(from);
  if (mode() === "list" && key === "ArrowRight") return cards[place + 1];
  if (mode() === "list" && key === "ArrowLeft") return cards[place - 1];
  const sideways = key === "ArrowRight" || key === "ArrowLeft", forward = key === "ArrowDown" || key === "ArrowRight";
  const distance = (one) => {
    const box = one.getBoundingClientRect();
    const across = box.left - here.left, down = box.top - here.top;
    const ahead = (sideways ? across : down) * (forward ? 1 : -1), aside = Math.abs(sideways ? down : across);
    return ahead > 4 ? ahead + 4 * aside : Infinity;
  };
  const best = cards.reduce((one, other) => distance(other) < distance(one) ? other : one, from);
  return best === from ? undefined : best;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target, current = target.closest?.(".card");
  const typing = target.matches?.("input, select, textarea");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    at("query").select();
  } else if (event.key.startsWith("Arrow") && (current || (target === at("query") && event.key === "ArrowDown"))) {
    const next = neighbour(current, event.key);
    if (next) focusCard(next);
    else if (event.key === "ArrowUp" && current) at("query").focus();
    event.preventDefault();
  } else if (current && target === current && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    current.click();
  } else if (event.key === "Escape") {
    if (current?.querySelector(".why")) current.click();
    else if (current) at("query").focus();
    else if (target === at("query") && target.value) { target.value = ""; search(); }
  }
});

at("photo").hidden = !pictures;
at("picture").addEventListener("change", async () => {
  const [file] = at("picture").files;
  at("picture").value = "";       // the same file may be chosen again
  if (!file) return;
  try {
    ask(await shrunk(file));
  } catch (error) {
    say(error.message, true);
  }
});
at("drop").addEventListener("click", () => { ask(null); at("query").focus(); });
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, async (event) => {
  const [file] = event.dataTransfer?.files || [];
  if (!pictures || ![...event.dataTransfer.types].includes("Files")) return;
  event.preventDefault();
  if (kind === "drop" && file) ask(await shrunk(file).catch((error) => { say(error.message, true); return beside; }));
});

at("form").addEventListener("submit", (event) => { event.preventDefault(); search(); });
at("keyform").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", at("key").value);
  search();
});
for (const name of [...FILTERS, "sort"]) at(name).addEventListener("change", search);
for (const one of document.querySelectorAll("input[name=mode]")) one.addEventListener("change", search);
at("clear").addEventListener("click", () => {
  for (const name of FILTERS) at(name).value = "";
  at("sort").value = "relevance";
  search();
});
recall();
if (at("query").value) search();
