// The tree as a picture: a block per node, as wide as its share of the pool, below the block of its parent.

const ROW = 18;
const MOST_ROWS = 14;
const LEAST_PIXELS = 0.6; // narrower blocks are not drawn
const SHADES = 6;

export class Icicle {
  /** chosen: told of the index of the node that was pointed at or clicked (click: true). */
  constructor(canvas, chosen) {
    this.canvas = canvas;
    this.tree = null;
    this.left = new Float64Array(0); // of each node, as shares of the whole
    this.depth = new Uint16Array(0);
    this.marked = -1;
    canvas.addEventListener("pointermove", (event) => chosen(this.at(event), false));
    canvas.addEventListener("click", (event) => chosen(this.at(event), true));
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(tree) {
    this.tree = tree;
    this.lay();
    this.draw();
  }

  mark(index) {
    if (this.marked === index) return;
    this.marked = index;
    this.draw();
  }

  /** Children lie side by side under their parent, the heaviest first, as the server lists them. */
  lay() {
    const { parent, weight } = this.tree;
    const count = parent.length;
    if (this.left.length < count) {
      this.left = new Float64Array(count);
      this.depth = new Uint16Array(count);
    }
    const next = new Float64Array(count);
    this.total = 0;
    for (let i = 0; i < count; i += 1) if (parent[i] < 0) this.total += weight[i];
    let root = 0;
    for (let i = 0; i < count; i += 1) {
      const above = parent[i];
      const begin = above < 0 ? root : next[above];
      this.left[i] = next[i] = begin;
      this.depth[i] = above < 0 ? 0 : this.depth[above] + 1;
      if (above < 0) root += weight[i];
      else next[above] += weight[i];
    }
  }

  draw() {
    const { canvas, tree } = this;
    const width = canvas.clientWidth;
    if (!tree || !width) return;
    const rows = Math.min(MOST_ROWS, 1 + tree.parent.reduce((most, _, i) => Math.max(most, this.depth[i]), 0));
    const ratio = devicePixelRatio || 1;
    canvas.style.height = `${rows * ROW}px`;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(rows * ROW * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(canvas);
    const shades = Array.from({ length: SHADES }, (_, at) => style.getPropertyValue(`--shade-${at}`));
    const line = style.getPropertyValue("--line");
    const oldest = tree.idle.reduce((most, idle) => Math.max(most, idle), 1);
    const scale = width / Math.max(1, this.total);
    for (let i = 0; i < tree.parent.length; i += 1) {
      const wide = tree.weight[i] * scale;
      if (wide < LEAST_PIXELS || this.depth[i] >= MOST_ROWS) continue;
      context.fillStyle = tree.parent[i] < 0 ? line : shades[Math.floor(SHADES * this.age(i, oldest))];
      const gap = wide > 3 ? 1 : 0;
      context.fillRect(this.left[i] * scale, this.depth[i] * ROW, wide - gap, ROW - 1);
    }
    if (this.marked >= 0 && this.marked < tree.parent.length) {
      context.strokeStyle = style.getPropertyValue("--text");
      context.lineWidth = 2;
      const wide = Math.max(3, tree.weight[this.marked] * scale);
      context.strokeRect(this.left[this.marked] * scale + 1, this.depth[this.marked] * ROW + 1, wide - 2, ROW - 3);
    }
  }

  /** How long a node has not been used, on a scale of powers: from 0 to just below 1. */
  age(index, oldest) {
    return 0.999 * (Math.log1p(this.tree.idle[index]) / Math.log1p(oldest));
  }

  /** The node under the pointer, -1 for none. */
  at(event) {
    const { canvas, tree } = this;
    if (!tree) return -1;
    const share = (event.offsetX / canvas.clientWidth) * this.total;
    const row = Math.floor(event.offsetY / ROW);
    for (let i = 0; i < tree.parent.length; i += 1) {
      if (this.depth[i] === row && share >= this.left[i] && share < this.left[i] + tree.weight[i]) return i;
    }
    return -1;
  }
}
