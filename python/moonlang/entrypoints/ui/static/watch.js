// The live view: asks for the state once a second while somebody looks, and changes the page in place.

import { getJson } from "./api.js";
import { Histogram, Lines } from "./charts.js";
import { byId, duration, element, percent, setText, short, sized } from "./dom.js";
import { Figures } from "./figures.js";
import { drawTiers } from "./tiers.js";
import { Tree } from "./tree.js";

const PERIOD_MS = 1000;
const RETRY_MS = 3000;
const POINTS = 120;
const ROLES = { regular: "whole server", prefill: "prefill", decode: "decode" };

export class Watch {
  /** failed, heard: told of errors and of each state. */
  constructor(failed, heard) {
    this.failed = failed;
    this.heard = heard;
    this.active = false;
    this.asking = false;
    this.timer = 0;
    this.figures = new Figures();
    this.throughput = new Lines(byId("throughput"), ["written", "read"], "tokens/s");
    this.ttft = new Histogram(byId("ttft"));
    this.itl = new Histogram(byId("itl"));
    this.tree = new Tree(failed);
    document.addEventListener("visibilitychange", () => this.again());
  }

  setActive(active) {
    this.active = active;
    this.tree.setActive(active);
    this.again();
  }

  /** Ask now, and from then on as long as the view is open in a tab that is seen. */
  again() {
    clearTimeout(this.timer);
    if (this.active && document.visibilityState === "visible") this.ask();
  }

  async ask() {
    if (this.asking) return;
    this.asking = true;
    const begun = performance.now();
    let wait = RETRY_MS;
    try {
      const state = await getJson("ui/state");
      this.heard(state);
      this.take(state);
      wait = Math.max(0, PERIOD_MS - (performance.now() - begun));
    } catch (error) {
      this.failed(error);
    }
    this.asking = false;
    this.timer = setTimeout(() => this.again(), wait);
  }

  /** One state, whoever asked for it. */
  take(state) {
    this.figures.take(state);
    if (!this.active) return;
    const figures = this.figures;
    drawTiles(state, figures);
    drawInstances(state, figures);
    drawTiers(loads(state));
    drawTransfers(state, figures);
    this.throughput.draw([figures.output, figures.prompt], POINTS);
    this.ttft.draw(figures.latencies("ttft_s"), figures.bounds);
    this.itl.draw(figures.latencies("itl_s"), figures.bounds);
    this.tree.setInstances(state.instances);
  }
}

function loads(state) {
  return state.instances.filter((instance) => instance.load).map((instance) => instance.load);
}

function sum(list, of) {
  return list.reduce((total, one) => total + (of(one) ?? 0), 0);
}

function drawTiles(state, figures) {
  const all = loads(state);
  const up = state.instances.filter((instance) => instance.up).length;
  const size = sum(all, (load) => load.max_total_tokens);
  const asked = sum(all, (load) => load.total_prompt_tokens);
  const tiles = [
    ["Instances up", `${up} of ${state.instances.length + state.left_out}`],
    ["Running", short(sum(all, (load) => load.num_running))],
    ["Waiting", short(sum(all, (load) => load.num_waiting + load.num_grammar + load.pairs.num_pairing))],
    ["Tokens per second", short(figures.output.at(-1))],
    ["KV pool in use", percent(size ? sum(all, (load) => load.used_tokens) / size : 0)],
    ["Prompt tokens cached", percent(asked ? sum(all, (load) => load.total_cached_tokens) / asked : 0)],
  ];
  const parts = sized(byId("tiles"), tiles.length, () => element("div", {}, element("dt"), element("dd")));
  tiles.forEach(([name, value], at) => {
    setText(parts[at].firstChild, name);
    setText(parts[at].lastChild, value);
  });
}

/** Rows of texts; the first of each is its heading. */
function drawTable(table, rows) {
  const columns = table.tHead.rows[0].cells.length;
  const make = () =>
    element("tr", {}, element("th", { scope: "row" }), ...Array.from({ length: columns - 1 }, () => element("td")));
  const nodes = sized(table.tBodies[0], rows.length, make);
  rows.forEach((texts, at) => texts.forEach((text, column) => setText(nodes[at].children[column], text)));
  return nodes;
}

function drawInstances(state, figures) {
  const rows = state.instances.map((instance) => [
    instance.name,
    ROLES[instance.kind] ?? instance.kind,
    condition(instance),
    ...(instance.load ? business(instance.load, figures.rates.get(instance.id)) : Array(5).fill("–")),
    duration(instance.uptime_s ?? NaN),
  ]);
  const nodes = drawTable(byId("instances"), rows);
  state.instances.forEach(({ up, problem }, at) => (nodes[at].className = up && !problem ? "" : "bad"));
}

function business(load, rate) {
  return [
    short(load.num_running),
    short(load.num_waiting + load.num_grammar + load.pairs.num_pairing),
    short(rate?.output),
    `${percent(load.token_usage)} of ${short(load.max_total_tokens)}`,
    percent(load.cache_hit_rate),
  ];
}

function condition(instance) {
  if (instance.problem) return instance.problem;
  if (!instance.up) return "down";
  if (instance.leaving) return "leaving";
  if (instance.breaker && instance.breaker !== "closed") return `breaker ${instance.breaker.replace("_", " ")}`;
  return instance.load ? "up" : "up, says nothing of itself";
}

function drawTransfers(state, figures) {
  const halves = state.instances.filter((instance) => instance.load && instance.kind !== "regular");
  byId("transfers").hidden = halves.length === 0;
  byId("no-transfers").hidden = halves.length > 0;
  const rows = halves.map(({ id, name, kind, load: { pairs } }) => [
    `${name} (${ROLES[kind]})`,
    short(pairs.num_moving),
    short(pairs.num_pairing),
    short(pairs.total_moved),
    `${short(pairs.total_moved_bytes)}B`,
    `${short(figures.rates.get(id)?.moved)}B/s`,
    duration(pairs.total_moved ? pairs.total_moving_ns / pairs.total_moved / 1e9 : NaN),
    trouble(pairs),
  ]);
  drawTable(byId("transfers"), rows);
}

function trouble(pairs) {
  const counts = [
    [pairs.total_failed, "failed"],
    [pairs.total_fallbacks, "computed by decode instead"],
    [pairs.quarantined_pages, "pages in quarantine"],
  ];
  const parts = counts.filter(([count]) => count).map(([count, text]) => `${short(count)} ${text}`);
  return parts.join(", ") || "none";
}
