// Elements made from data. Text is always a text node, so that no name can become markup.
const SVG = new Set(["svg", "line", "path", "rect", "circle"]);
const OWN = new Set(["open", "checked", "value", "selected"]); // what the person at the page sets

export function h(tag, props, ...children) {
  const el = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    el.setAttribute(name === "cls" ? "class" : name, value === true ? "" : String(value));
  }
  el.append(...flat(children));
  return el;
}

const flat = (children) => children.flat(9)
  .filter((child) => child !== null && child !== undefined && child !== false && child !== true)
  .map((child) => (child instanceof Node ? child : String(child)));

// Make the children of `parent` like `fresh`, and keep nodes that are alike: focus, scroll position and typed text stay.
// A node with a key is found again wherever it is. A field without one could pass its text on to another field, so every
// field has a key.
export function update(parent, fresh) {
  const nodes = flat([fresh]).map((node) => (node instanceof Node ? node : document.createTextNode(node)));
  const known = new Map([...parent.childNodes].filter(keyOf).map((node) => [keyOf(node), node]));
  nodes.forEach((node, i) => {
    const present = parent.childNodes[i];
    const mine = keyOf(node) ? known.get(keyOf(node)) : present && !keyOf(present) ? present : null;
    if (!mine) {
      parent.insertBefore(node, present || null);
      return;
    }
    if (mine !== present) parent.insertBefore(mine, present || null);
    become(mine, node);
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}

const keyOf = (node) => node.dataset?.key || "";

function become(old, fresh) {
  if (old === fresh) return;
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName || keyOf(old) !== keyOf(fresh)) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !OWN.has(name) && name !== "style") old.removeAttribute(name);
  }
  for (const { name, value } of [...fresh.attributes]) {
    if (old.getAttribute(name) !== value && !(OWN.has(name) && old.matches("input,select,textarea,details,option"))) {
      old.setAttribute(name, value);
    }
  }
  if (old.matches("progress")) old.value = fresh.value;
  if (old.dataset.keep === undefined) update(old, [...fresh.childNodes]);
}

export const pill = (text, kind = "") => h("span", { cls: `pill ${kind}` }, text);
export const tile = (value, label, kind = "") => h("div", { cls: `tile ${kind}` }, h("b", {}, value), h("span", {}, label));
export const card = (title, ...rest) => h("section", { cls: "card" }, h("h2", {}, title), ...rest);
export const note = (...text) => h("p", { cls: "muted" }, ...text);
export const call = (kind, title, ...rest) => h("div", { cls: `call ${kind}`, "data-key": `call-${title}` }, title && h("h2", {}, title), ...rest);
export const button = (text, act, data = {}, cls = "") => {
  const named = Object.fromEntries(Object.entries(data).map(([name, value]) => [`data-${name}`, value]));
  return h("button", { type: "button", "data-do": act, cls, "data-key": `${act}-${Object.values(data).join("-")}`, ...named }, text);
};
export const bar = (value, max, text, label) => h("span", { cls: "bar" },
  h("progress", { value: Math.min(value, max), max: Math.max(max, 1e-9), "aria-label": label || text }), h("span", {}, text));
export const facts = (...rows) => h("dl", {}, rows.filter(Boolean).map(([name, ...value]) => [h("dt", {}, name), h("dd", {}, ...value)]));

// A table. `heads`: names, or {t: name, n: 1} for numbers. `rows`: arrays of cells, the first of which names the row. On
// a narrow screen every row becomes a block with the name of each value.
export function table(caption, heads, rows, { empty = "Nothing yet.", keys, stack = true } = {}) {
  if (!rows.length) return note(empty);
  const name = (head) => head.t ?? head;
  return h("div", { cls: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", { cls: stack ? "stack" : "" }, h("caption", {}, caption),
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col", cls: head.n ? "n" : null }, name(head))))),
      h("tbody", {}, rows.map((row, r) => h("tr", { "data-key": keys ? `row-${keys[r]}` : null }, row.map((cell, c) => {
        const cls = heads[c].n ? "n" : null;
        return c ? h("td", { cls, "data-l": name(heads[c]) }, h("span", { cls: "v" }, cell ?? "–")) : h("th", { scope: "row", cls }, cell ?? "–");
      }))))));
}
