// Two charts in SVG. Their elements are made once and changed in place.

import { duration, element, setText, shape, short } from "./dom.js";
import { quantile } from "./figures.js";

const WIDTH = 300;
const HEIGHT = 96;

function frame() {
  return shape("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none",
    role: "img",
    class: "chart",
  });
}

/** Lines over the last two minutes. names: of the series, which are told apart by class `series-N` and in words. */
export class Lines {
  constructor(parent, names, unit) {
    this.names = names;
    this.unit = unit;
    this.svg = frame();
    this.lines = names.map((_, at) => shape("polyline", { class: `series series-${at}`, fill: "none" }));
    this.svg.append(
      shape("line", { x1: 0, y1: HEIGHT - 0.5, x2: WIDTH, y2: HEIGHT - 0.5, class: "axis" }),
      ...this.lines,
    );
    this.legend = element("ul", { class: "legend" });
    this.labels = names.map((name, at) => {
      const value = element("b", {}, "–");
      this.legend.append(element("li", {}, element("i", { class: `swatch series-${at}` }), `${name} `, value));
      return value;
    });
    parent.append(this.svg, this.legend);
  }

  draw(series, points) {
    const top = Math.max(1, ...series.flat()) * 1.05;
    series.forEach((values, at) => {
      const from = points - values.length;
      const path = values.map(
        (value, i) => `${(((from + i) * WIDTH) / (points - 1)).toFixed(1)},${(HEIGHT * (1 - value / top)).toFixed(1)}`,
      );
      this.lines[at].setAttribute("points", path.join(" "));
      setText(this.labels[at], `${short(values.at(-1) ?? NaN)} ${this.unit}`);
    });
    const words = series.map((values, at) => `${this.names[at]} ${short(values.at(-1) ?? NaN)} ${this.unit}`);
    this.svg.setAttribute("aria-label", `${words.join(", ")}; highest ${short(top / 1.05)} in two minutes`);
  }
}

/** How many requests or tokens took how long. */
export class Histogram {
  constructor(parent) {
    this.svg = frame();
    this.bars = [];
    this.scale = element("p", { class: "scale muted", "aria-hidden": "true" }, element("span"), element("span"));
    this.words = element("p", { class: "quantiles" }, "Nothing yet: it is counted while this page is open.");
    parent.append(this.svg, this.scale, this.words);
  }

  draw(counts, bounds) {
    if (!counts.length) return;
    let low = counts.findIndex((count) => count > 0);
    let high = counts.findLastIndex((count) => count > 0);
    if (low < 0) {
      setText(this.words, "Nothing in the last five minutes.");
      this.svg.setAttribute("aria-label", "Nothing in the last five minutes");
      for (const bar of this.bars) bar.setAttribute("height", "0");
      return;
    }
    low = Math.max(0, low - 1);
    high = Math.min(counts.length - 1, Math.max(high + 1, low + 5));
    this.lay(high - low + 1);
    const top = Math.max(...counts);
    const wide = WIDTH / (high - low + 1);
    this.bars.forEach((bar, at) => {
      const tall = ((HEIGHT - 2) * counts[low + at]) / top;
      bar.setAttribute("x", String(at * wide + 1));
      bar.setAttribute("width", String(wide - 2));
      bar.setAttribute("y", String(HEIGHT - tall));
      bar.setAttribute("height", String(tall));
    });
    setText(this.scale.firstChild, duration(low ? bounds[low - 1] : 0));
    setText(this.scale.lastChild, high < bounds.length ? duration(bounds[high]) : "more");
    const [half, most, all] = [0.5, 0.9, 0.99].map((share) => duration(quantile(counts, bounds, share)));
    const total = counts.reduce((sum, count) => sum + count, 0);
    const words = `Half within ${half}, 90 % within ${most}, 99 % within ${all} (${short(total)} in five minutes)`;
    setText(this.words, words);
    this.svg.setAttribute("aria-label", words);
  }

  lay(count) {
    while (this.bars.length > count) this.bars.pop().remove();
    while (this.bars.length < count) {
      const bar = shape("rect", { class: "bar", rx: 1 });
      this.bars.push(bar);
      this.svg.append(bar);
    }
  }
}
