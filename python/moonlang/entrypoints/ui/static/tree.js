// The prefix tree: a picture of all nodes that the server reports, and a list one can walk with the keyboard.

import { getJson } from "./api.js";
import { byId, element, percent, setText, short, sized } from "./dom.js";
import { Icicle } from "./icicle.js";

const PERIOD_MS = 3000;
const MOST_CHILDREN = 30; // of a node that the list shows; the rest is one line
const MOST_ROWS = 400;
const FIRST_ROWS = 12;

export class Tree {
  constructor(failed) {
    this.failed = failed;
    this.active = false;
    this.asking = false;
    this.timer = 0;
    this.found = null;
    this.begun = false;
    this.open = new Set(); // ids of nodes whose children are listed
    this.current = -1; // id of the row that the keyboard is on
    this.rows = [];
    this.form = byId("tree-form");
    this.list = byId("tree");
    this.icicle = new Icicle(byId("icicle"), (index, clicked) => this.pointed(index, clicked));
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("change", () => this.again());
    this.list.addEventListener("keydown", (event) => this.key(event));
    this.list.addEventListener("click", (event) => this.clicked(event));
  }

  setActive(active) {
    this.active = active;
    this.again();
  }

  setInstances(instances) {
    const select = this.form.elements.instance;
    const options = sized(select, instances.length, () => element("option"));
    const before = select.options.length ? select.value : "";
    instances.forEach((instance, at) => {
      if (options[at].value !== instance.id) options[at].value = instance.id;
      setText(options[at], instance.kind === "regular" ? instance.name : `${instance.name} (${instance.kind})`);
    });
    if (select.value !== before || !this.found) this.again();
  }

  again() {
    clearTimeout(this.timer);
    if (this.active && this.form.elements.instance.value && document.visibilityState === "visible") this.ask();
    else if (this.active) this.timer = setTimeout(() => this.again(), PERIOD_MS);
  }

  async ask() {
    if (this.asking) return;
    this.asking = true;
    const { instance, nodes, live } = this.form.elements;
    try {
      this.take(await getJson(`ui/tree?instance=${encodeURIComponent(instance.value)}&nodes=${nodes.value}`));
    } catch (error) {
      const text = error.status === 401 ? "The tree shows prompts: it wants the admin key." : error.message;
      setText(byId("tree-summary"), text);
    }
    this.asking = false;
    if (live.checked) this.timer = setTimeout(() => this.again(), PERIOD_MS);
  }

  take(found) {
    this.found = found;
    this.children = found.parent.map(() => []);
    this.roots = [];
    found.parent.forEach((parent, index) => (parent < 0 ? this.roots : this.children[parent]).push(index));
    const ids = new Set(found.id);
    for (const id of this.open) if (!ids.has(id)) this.open.delete(id);
    if (!this.begun) this.begin();
    const tokens = this.roots.reduce((sum, root) => sum + found.weight[root], 0) * found.page_size;
    const shown = found.parent.length - this.roots.length;
    const summary = `${short(tokens)} tokens in ${short(found.num_nodes)} nodes, the ${short(shown)} biggest shown`;
    setText(byId("tree-summary"), summary);
    byId("icicle").setAttribute("aria-label", `Prefix tree: ${summary}. The list below has the same nodes.`);
    this.icicle.show(found);
    this.draw();
  }

  /** The first tree is opened where it is heaviest, which the server lists first, until there is something to see. */
  begin() {
    let rows = this.roots.length;
    for (let i = 0; i < this.children.length && rows < FIRST_ROWS; i += 1) {
      this.open.add(this.found.id[i]);
      rows += Math.min(this.children[i].length, MOST_CHILDREN);
    }
    this.begun = rows >= FIRST_ROWS;
  }

  /** The rows of the list: what is open, and one row for the rest of each node's children. */
  visible() {
    const rows = [];
    const add = (index, level) => {
      if (rows.length >= MOST_ROWS) return;
      rows.push({ index, level });
      if (!this.open.has(this.found.id[index])) return;
      const children = this.children[index];
      for (const child of children.slice(0, MOST_CHILDREN)) add(child, level + 1);
      const rest = this.rest(index, children.slice(0, MOST_CHILDREN));
      if (rest.count > 0 && rows.length < MOST_ROWS) rows.push({ index: -1, above: index, level: level + 1, ...rest });
    };
    for (const root of this.roots) add(root, 1);
    return rows;
  }

  rest(index, shown) {
    const { children, weight, pages } = this.found;
    const listed = shown.reduce((sum, child) => sum + weight[child], 0);
    return { count: children[index] - shown.length, weight: Math.max(0, weight[index] - pages[index] - listed) };
  }

  draw() {
    const focused = this.list.contains(document.activeElement);
    this.rows = this.visible();
    const items = sized(this.list, this.rows.length, () =>
      element(
        "li",
        { role: "treeitem", tabindex: "-1" },
        element("span", { class: "prefix" }),
        element("span", { class: "sizes" }),
      ),
    );
    let at = this.rows.findIndex((row) => row.index >= 0 && this.found.id[row.index] === this.current);
    if (at < 0) at = 0;
    this.rows.forEach((row, i) => this.drawRow(items[i], row, i === at));
    if (focused) items[at]?.focus({ preventScroll: true });
  }

  drawRow(item, row, current) {
    const { found } = this;
    item.setAttribute("aria-level", row.level);
    item.style.setProperty("--level", row.level);
    item.tabIndex = current ? 0 : -1;
    if (row.index < 0) {
      item.removeAttribute("aria-expanded");
      setText(item.firstChild, `${short(row.count)} more`);
      setText(item.lastChild, `${short(row.weight * found.page_size)} tokens`);
      return;
    }
    const has = found.children[row.index] > 0;
    if (has) item.setAttribute("aria-expanded", String(this.open.has(found.id[row.index])));
    else item.removeAttribute("aria-expanded");
    setText(item.firstChild, this.name(row.index));
    setText(item.lastChild, this.sizes(row.index));
  }

  name(index) {
    const { parent, texts, id } = this.found;
    if (parent[index] < 0)
      return this.roots.length > 1 ? `Prompts under key ${this.roots.indexOf(index) + 1}` : "All prompts";
    const text = texts[index];
    return text === undefined ? `Node ${id[index]}` : text.replaceAll("\n", "⏎") || "∅";
  }

  sizes(index) {
    const { weight, pages, page_size, hits, locked } = this.found;
    const whole = weight[index] * page_size;
    const own = pages[index] * page_size;
    const total = this.roots.reduce((sum, root) => sum + weight[root], 0) * page_size;
    const below = own && own !== whole ? `, ${short(own)} of them its own` : "";
    const use = own ? `, ${short(hits[index])} hits${locked[index] ? ", in use" : ""}` : "";
    return `${short(whole)} tokens (${percent(whole / total)})${below}${use}`;
  }

  pointed(index, clicked) {
    this.icicle.mark(index);
    if (index < 0) return;
    setText(byId("tree-node"), `${this.name(index)} – ${this.sizes(index)}`);
    if (!clicked) return;
    for (let above = this.found.parent[index]; above >= 0; above = this.found.parent[above])
      this.open.add(this.found.id[above]);
    this.current = this.found.id[index];
    this.draw();
    this.list.querySelector('[tabindex="0"]')?.focus();
  }

  clicked(event) {
    const row = this.rows[[...this.list.children].indexOf(event.target.closest("li"))];
    if (row) this.go(row, row.index >= 0 && !this.open.has(this.found.id[row.index]));
  }

  /** Make a row the current one, with its children listed or not. */
  go(row, opened) {
    if (row.index < 0) return;
    const id = this.found.id[row.index];
    this.current = id;
    if (opened !== undefined) {
      this.open[opened ? "add" : "delete"](id);
      this.begun = true; // from now on it is as the user wants it
    }
    this.draw();
    this.list.querySelector('[tabindex="0"]')?.focus();
    this.icicle.mark(row.index);
  }

  /** The keys of a tree: up and down, right to open or go in, left to close or go out. */
  key(event) {
    const at = [...this.list.children].indexOf(document.activeElement);
    const row = this.rows[at];
    if (!row) return;
    const isOpen = row.index >= 0 && this.open.has(this.found.id[row.index]);
    const real = this.rows.filter((one) => one.index >= 0);
    const place = real.indexOf(row);
    const moves = {
      ArrowDown: () => this.go(real[Math.min(real.length - 1, place + 1)]),
      ArrowUp: () => this.go(real[Math.max(0, place - 1)]),
      Home: () => this.go(real[0]),
      End: () => this.go(real.at(-1)),
      ArrowRight: () => (isOpen ? this.go(real[Math.min(real.length - 1, place + 1)]) : this.go(row, true)),
      ArrowLeft: () => (isOpen ? this.go(row, false) : this.go(this.parentRow(row))),
      Enter: () => this.go(row, !isOpen),
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    moves[event.key]();
  }

  parentRow(row) {
    return this.rows.find((one) => one.index === this.found.parent[row.index]) ?? row;
  }
}
