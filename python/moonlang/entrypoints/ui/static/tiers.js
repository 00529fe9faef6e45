// Where keys and values lie: the device pools, host memory, and a shared store.

import { byId, element, setText, short, sized } from "./dom.js";

/** loads: of the instances that say something of themselves. */
export function drawTiers(loads) {
  const bars = [device(loads), host(loads), store(loads)];
  const make = () =>
    element("div", { class: "tier" }, element("p"), element("div", { class: "meter", "aria-hidden": "true" }));
  const nodes = sized(byId("tiers"), bars.length, make);
  bars.forEach(({ text, parts = [] }, at) => {
    const [words, meter] = nodes[at].children;
    setText(words, text);
    meter.hidden = parts.length === 0;
    const pieces = sized(meter, parts.length, () => element("div"));
    parts.forEach(([kind, share], i) => {
      pieces[i].className = kind;
      pieces[i].style.width = `${(100 * Math.min(1, share)).toFixed(2)}%`;
    });
  });
}

function sum(loads, of) {
  return loads.reduce((total, load) => total + of(load), 0);
}

function device(loads) {
  const size = Math.max(
    1,
    sum(loads, (load) => load.max_total_tokens),
  );
  const used = sum(loads, (load) => load.used_tokens);
  const cached = sum(loads, (load) => load.cached_tokens);
  const parts = [["used", used / size], ["cached", cached / size]]; // prettier-ignore
  return { text: `Device: ${short(used)} tokens in use, ${short(cached)} cached, of ${short(size)}`, parts };
}

function host(loads) {
  const size = sum(loads, (load) => load.tiers.host_slots * load.page_size);
  if (!size) return { text: "Host memory: not in use (--enable-hierarchical-cache)" };
  const used = sum(loads, (load) => load.tiers.host_used * load.page_size);
  const back = sum(loads, (load) => load.tiers.total_host_tokens);
  const text = `Host memory: ${short(used)} of ${short(size)} tokens, ${short(back)} brought back so far`;
  return { text, parts: [["host", used / size]] };
}

function store(loads) {
  const users = loads.filter((load) => load.store?.backend);
  if (!users.length) return { text: "Store: none attached" };
  const names = [...new Set(users.map((load) => load.store.backend))].join(", ");
  const saved = sum(users, (load) => load.tiers.total_saved_tokens);
  const back = sum(users, (load) => load.tiers.total_store_tokens);
  return { text: `Store (${names}): ${short(saved)} tokens saved so far, ${short(back)} brought back` };
}
