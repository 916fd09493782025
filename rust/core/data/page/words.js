// Elements and words. Text from files becomes text nodes and attribute values, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** What would be invisible, or turn the direction of writing, is shown as its number. */
function visible(text) {
  const hidden = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;
  return text.replace(hidden, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
}

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : visible(String(value)));
  }
  const wanted = children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false);
  node.append(...wanted.map((c) => (c instanceof Node ? c : visible(String(c)))));
  return node;
}

const el = (tag, properties = {}, ...children) => fill(document.createElement(tag), properties, children);
const drawn = (tag, properties = {}, ...children) => fill(document.createElementNS(SVG, tag), properties, children);
const byId = (id) => document.getElementById(id);

function bytes(n) {
  if (n === null || n === undefined) return "–";
  if (n < 1024) return `${n} B`;
  let value = n / 1024;
  let unit = 0;
  while (value >= 999.5 && unit < 3) {
    value /= 1024;
    unit += 1;
  }
  return `${value.toFixed(value < 9.95 ? 1 : 0)} ${["KiB", "MiB", "GiB", "TiB"][unit]}`;
}

/** A share that says 100 only if it is all. */
function percent(share) {
  const tenths = Math.floor(share * 1000 + 1e-9) / 10;
  return `${tenths % 1 === 0 ? tenths.toFixed(0) : tenths.toFixed(1)} %`;
}

/** Three digits of a number of any size. */
function digits(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-3 || size >= 1e5) return value.toExponential(1).replace("e+", "e");
  return value.toFixed(Math.min(5, Math.max(0, 2 - Math.floor(Math.log10(size)))));
}

const whole = (n) => n.toLocaleString("en");
const plural = (n, one, many = `${one}s`) => `${whole(n)} ${n === 1 ? one : many}`;
const sum = (values) => values.reduce((a, b) => a + b, 0);

/** Text in which backticks mark code. */
const marked = (text) => text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));

function button(text, pressed, properties = {}) {
  return el("button", { type: "button", click: pressed, ...properties }, text);
}

/** A command with a button that copies it. */
function command(text) {
  // Lines break between words, and within one only if it is longer than a line.
  const code = el("code", {}, text.split(" ").map((word, i) => [i ? " " : null, el("span", {}, word)]));
  const copied = button("Copy", () => copy(text, code, copied), { class: "quiet copy", "aria-label": `Copy: ${text}` });
  return el("div", { class: "command" }, code, copied);
}

async function copy(text, code, pressed) {
  try {
    await navigator.clipboard.writeText(text);
    pressed.textContent = "Copied";
  } catch {
    // A browser that lets no page write: what is selected can be copied by hand.
    getSelection().selectAllChildren(code);
    pressed.textContent = "Selected";
  }
  setTimeout(() => (pressed.textContent = "Copy"), 1500);
}

/** A table of plain rows. `numeric` says which columns are numbers. */
function plainTable(caption, heads, rows, numeric = []) {
  const kind = (i) => ({ class: numeric.includes(i) ? "number" : null });
  const head = el("tr", {}, heads.map((h, i) => el("th", { scope: "col", ...kind(i) }, h)));
  const body = rows.map((row) => el("tr", {}, row.map((cell, i) => el("td", kind(i), cell))));
  return el("table", { class: "plain" }, el("caption", {}, caption), el("thead", {}, head), el("tbody", {}, body));
}
