// Small things that every part of the page needs: elements, numbers for people.

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id; the page is broken without it. */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`There is no #${id}`);
  return found;
}

/** A new element. attributes: by name; children: nodes and texts. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** The same for SVG. */
export function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Change a text only when it is another one: the browser then has nothing to lay out. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Make `parent` have `count` children, by `make` where they lack; those there are stay. */
export function sized(parent, count, make) {
  while (parent.children.length > count) parent.lastElementChild.remove();
  while (parent.children.length < count) parent.append(make(parent.children.length));
  return parent.children;
}

const UNITS = ["", "k", "M", "G", "T", "P"];

/** 1234567 -> "1.23M" */
export function short(number) {
  if (number === null || number === undefined || !Number.isFinite(number)) return "–";
  let unit = 0;
  while (Math.abs(number) >= 1000 && unit < UNITS.length - 1) {
    number /= 1000;
    unit += 1;
  }
  const whole = Math.abs(number) >= 100 || (unit === 0 && Number.isInteger(number));
  const digits = whole ? 0 : unit === 0 || Math.abs(number) >= 10 ? 1 : 2;
  return number.toFixed(digits) + UNITS[unit];
}

/** Seconds with the unit that suits them. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds === 0) return "0 s";
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${(seconds * 1000).toPrecision(3)} ms`;
  if (seconds < 100) return `${seconds.toPrecision(3)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

/** 0.123 -> "12 %" */
export function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return Number.isFinite(share) ? `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %` : "–";
}
