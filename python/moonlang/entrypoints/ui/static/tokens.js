// The tokens of an answer with their probabilities: a tint each, and the alternatives of the one that is looked at.

import { element, percent } from "./dom.js";

const STEPS = 5; // tints: from sure to a guess
const MOST = 4000; // tokens that become elements of their own

let lists = 0;

export class Tokens {
  constructor() {
    lists += 1;
    this.entries = [];
    this.chosen = -1;
    this.list = element("p", {
      class: "text tokens",
      role: "listbox",
      tabindex: "0",
      "aria-label": "Tokens: arrow keys show each one's probability",
      "aria-orientation": "horizontal",
    });
    this.detail = element("div", { class: "alternatives", role: "status", hidden: "" });
    this.node = element("div", {}, this.list, this.detail);
    this.prefix = `tokens-${lists}`;
    this.list.addEventListener("click", (event) => {
      const at = event.target.dataset.at;
      if (at !== undefined) this.choose(Number(at));
    });
    this.list.addEventListener("keydown", (event) => this.step(event));
    this.list.addEventListener("focus", () => this.choose(Math.max(0, this.chosen)));
  }

  add(entries) {
    for (const entry of entries) {
      if (this.entries.length >= MOST) {
        this.list.append(entry.token);
        continue;
      }
      const at = this.entries.length;
      const step = Math.min(STEPS - 1, Math.floor(-entry.logprob));
      const span = element("span", {
        role: "option",
        id: `${this.prefix}-${at}`,
        "data-at": at,
        class: `p${step}`,
      });
      span.setAttribute("aria-selected", "false");
      span.append(entry.token);
      this.entries.push(entry);
      this.list.append(span);
    }
  }

  step(event) {
    const last = this.entries.length - 1;
    const at = { ArrowRight: this.chosen + 1, ArrowLeft: this.chosen - 1, Home: 0, End: last }[event.key];
    if (at === undefined) return;
    event.preventDefault();
    this.choose(Math.min(last, Math.max(0, at)));
  }

  choose(at) {
    const entry = this.entries[at];
    if (!entry) return;
    this.list.children[this.chosen]?.setAttribute("aria-selected", "false");
    this.chosen = at;
    this.list.children[at].setAttribute("aria-selected", "true");
    this.list.setAttribute("aria-activedescendant", `${this.prefix}-${at}`);
    const others = entry.top_logprobs.some((one) => one.token === entry.token)
      ? entry.top_logprobs
      : [entry, ...entry.top_logprobs];
    this.detail.hidden = false;
    this.detail.replaceChildren(table(entry, others));
  }
}

function table(chosen, entries) {
  const rows = entries.map((entry) => {
    const bar = element("div", { class: "bar" });
    bar.style.width = `${100 * Math.exp(entry.logprob)}%`;
    const name = element("th", { scope: "row" }, visible(entry.token));
    const row = element(
      "tr",
      {},
      name,
      element("td", {}, percent(Math.exp(entry.logprob))),
      element("td", { class: "bars" }, bar),
    );
    if (entry.token === chosen.token) row.className = "chosen";
    return row;
  });
  const caption = element("caption", {}, `${visible(chosen.token)} had ${percent(Math.exp(chosen.logprob))}`);
  return element("table", {}, caption, element("tbody", {}, ...rows));
}

/** A token one can see: blanks and line ends have signs. */
function visible(token) {
  return token === "" ? "∅" : token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}
