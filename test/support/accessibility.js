// What a machine can check of a page's accessibility. The value: one line per thing that is wrong.
(() => {
  const wrong = [];
  const visible = (node) => node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  const say = (node, text) => wrong.push(`${node.tagName.toLowerCase()}#${node.id}.${node.className}: ${text}`);

  // References lead somewhere, and ids are unique.
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) wrong.push(`two elements are #${id}`);
  for (const name of ["aria-labelledby", "aria-describedby", "aria-controls", "aria-activedescendant", "for"]) {
    for (const node of document.querySelectorAll(`[${name}]`)) {
      for (const id of node.getAttribute(name).split(/\s+/))
        if (!ids.includes(id)) say(node, `${name} leads to no #${id}`);
    }
  }

  // Fields have labels: a placeholder is gone as soon as one writes.
  for (const node of document.querySelectorAll("input, select, textarea")) {
    const text = node.ariaLabel ?? [...node.labels].map((label) => label.textContent).join("");
    if (!text.trim()) say(node, "has no label");
  }

  // Headings do not skip a level; pictures have a text.
  let level = 0;
  for (const heading of [...document.querySelectorAll("h1,h2,h3,h4,h5,h6")].filter(visible)) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) say(heading, `comes after a heading of level ${level}`);
    level = next;
  }
  for (const image of document.querySelectorAll(
    "img:not([alt]), canvas:not([aria-label]), svg[role=img]:not([aria-label])",
  )) {
    if (visible(image)) say(image, "has no text");
  }

  // Whatever takes the focus is large enough to hit.
  for (const node of document.querySelectorAll("button, input, select, textarea, summary, [role=tab]")) {
    const { width, height } = node.getBoundingClientRect();
    const label = node.closest("label")?.getBoundingClientRect() ?? { width, height };
    if (visible(node) && Math.max(height, label.height) < 24 - 1) say(node, `is ${height} px high`);
  }

  // Every text stands out from what is behind it.
  const parse = (color) => {
    const [r, g, b, a = 1] = color.match(/[\d.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const over = (top, below) => top.rgb.map((value, i) => value * top.a + below[i] * (1 - top.a));
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((value) =>
      value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4,
    );
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !visible(node) || node.closest("button:disabled, .visually-hidden, option"))
      continue;
    const style = getComputedStyle(node);
    const back = behind(node);
    const [one, two] = [light(over(parse(style.color), back)), light(back)];
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5))
      say(node, `contrast ${ratio.toFixed(2)} of "${walker.currentNode.data.trim().slice(0, 20)}"`);
  }
  return [...new Set(wrong)];
})();
