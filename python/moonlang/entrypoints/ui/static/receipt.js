// The receipt of an answer: where its time went, and where its prompt came from.

import { duration, element, percent } from "./dom.js";

const STAGES = {
  queue: "Waiting",
  prefill: "Reading the prompt",
  transfer: "Moving pages to the decode server",
  decode: "Writing the answer",
  compute: "Computing",
  network: "Between server and page",
};
const SOURCES = {
  device: "device cache",
  host: "host memory",
  storage: "shared store",
  computed: "computed now",
};
const MOST_CELLS = 192;

/** meta: of the answer; total_s: as measured here. */
export function receipt(meta, total) {
  const stages = [...meta.receipt.stages];
  const outside = total - stages.reduce((sum, stage) => sum + stage.seconds, 0);
  if (outside > 0) stages.push({ name: "network", seconds: outside });
  return element(
    "details",
    { class: "receipt" },
    element("summary", {}, "Receipt"),
    element("h4", {}, "Time"),
    timeBar(stages, total),
    timeList(stages, total),
    element("h4", {}, "Prompt"),
    ...prompt(meta),
  );
}

function timeBar(stages, total) {
  const bar = element("div", { class: "stages", "aria-hidden": "true" });
  for (const stage of stages) {
    const part = element("div", { class: `stage ${stage.name}` });
    part.style.flexGrow = String((100 * stage.seconds) / total); // shares below 1 in all would leave a gap
    bar.append(part);
  }
  return bar;
}

function timeList(stages, total) {
  const rows = stages.map((stage) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, swatch(`stage ${stage.name}`), STAGES[stage.name] ?? stage.name),
      element("td", {}, duration(stage.seconds)),
      element("td", {}, percent(stage.seconds / total)),
    ),
  );
  const caption = element("caption", { class: "visually-hidden" }, "Where the time went");
  return element("table", {}, caption, element("tbody", {}, ...rows));
}

function prompt(meta) {
  const size = meta.receipt.page_size;
  const sources = meta.receipt.prompt_tokens_by_source;
  const rows = Object.entries(SOURCES)
    .filter(([name]) => sources[name])
    .map(([name, text]) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, swatch(`source ${name}`), `From ${text}`.replace("From computed", "Computed")),
        element("td", {}, `${sources[name]} tokens`),
        element("td", {}, percent(sources[name] / meta.prompt_tokens)),
      ),
    );
  const caption = element("caption", { class: "visually-hidden" }, "Where the prompt came from");
  const parts = [pages(sources, size), element("table", {}, caption, element("tbody", {}, ...rows))];
  const notes = [];
  if (sources.received)
    notes.push(`The pages of ${sources.received} tokens came from the prefill server; the decode server had the rest.`);
  const miss = meta.cached_tokens_details.storage_miss;
  if (miss) notes.push(`The store brought nothing: ${miss}.`);
  if (meta.num_retractions) notes.push(`Retracted ${meta.num_retractions} times for lack of memory.`);
  if (notes.length) parts.push(element("p", { class: "muted" }, notes.join(" ")));
  return parts;
}

/** A cell per page of the prompt, or per several, coloured by its source: the prefix first, as the tiers hold it. */
function pages(sources, size) {
  const total = Object.keys(SOURCES).reduce((sum, name) => sum + (sources[name] ?? 0), 0);
  const perCell = Math.max(size, Math.ceil(total / MOST_CELLS));
  const strip = element("div", { class: "pages", "aria-hidden": "true" });
  for (const name of Object.keys(SOURCES)) {
    for (let left = sources[name] ?? 0; left > 0; left -= perCell)
      strip.append(element("i", { class: `source ${name}` }));
  }
  const page = size === 1 ? "a token" : `a page of ${size} tokens`;
  const unit = `A cell is ${perCell === size ? page : `${perCell} tokens`}.`;
  return element("div", {}, strip, element("p", { class: "muted" }, unit));
}

function swatch(kind) {
  return element("i", { class: `swatch ${kind}`, "aria-hidden": "true" });
}
