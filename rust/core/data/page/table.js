// The table of files: filters, order, pages, keys.

const PAGE = 100;

const STATES = {
  failed: "Not readable",
  problems: "With problems",
  warnings: "With warnings",
  sound: "Nothing found",
  copies: "Copies",
  alike: "Much alike",
};

const rankOf = (a) => (a.rank !== null ? a.rank : Math.max(0, ...Object.keys(a.ranks).map(Number)));
const measured = (of) => (f) => of(f.adapter?.weights ?? {}) ?? null;

/** Title, sort key, cell; `number` columns begin with the largest. */
const COLUMNS = [
  { id: "name", title: "File", key: (f) => f.name.label.toLowerCase() },
  { id: "family", title: "Family", key: (f) => f.family, cell: (f) => f.family },
  { id: "dialect", title: "Dialect", key: (f) => f.dialect, cell: (f) => f.dialect },
  { id: "kind", title: "Kind", key: (f) => f.kind, cell: (f) => f.kind },
  { id: "rank", title: "Rank", number: true, key: (f) => f.adapter && rankOf(f.adapter), cell: rankCell },
  { id: "dtype", title: "Type", key: (f) => f.adapter?.dtype, cell: (f) => f.adapter?.dtype },
  { id: "size", title: "Size", number: true, key: (f) => f.bytes, cell: (f) => bytes(f.bytes) },
  { id: "norm", title: "Norm", number: true, weights: true, key: measured((w) => w.norm), cell: (f) => digits(measured((w) => w.norm)(f)) },
  { id: "effective", title: "Eff. rank", number: true, weights: true, key: measured((w) => w.effective_rank), cell: (f) => digits(measured((w) => w.effective_rank)(f)) },
  { id: "state", title: "Found", key: (f) => -f.badness, cell: stateCell },
];

function rankCell(f) {
  if (!f.adapter) return null;
  const known = Object.keys(f.adapter.ranks).map(Number);
  if (f.adapter.rank !== null || known.length === 0) return f.adapter.rank ?? "–";
  return `${Math.min(...known)}–${Math.max(...known)}`;
}

function stateCell(f) {
  const count = (level) => sum(f.findings.filter((x) => x.level === level).map((x) => x.count));
  const words = {
    failed: () => ["bad", f.error.code],
    problems: () => ["bad", plural(count("problem"), "problem")],
    warnings: () => ["unsure", plural(count("warning"), "warning")],
    sound: () => null,
  }[f.state]();
  const tags = [f.copy && "copy", f.alike && "alike"].filter(Boolean);
  return [words && el("span", { class: `tag ${words[0]}` }, words[1]), tags.map((tag) => el("span", { class: "tag" }, tag))];
}

/** What the table needs to know of each file, worked out once. */
function listed(data, names) {
  const group = (i, copies) => data.groups.some((g) => (g.relation !== "delta") === copies && g.files.includes(i));
  return data.files.map((file, index) => {
    const a = file.adapter;
    const state = standing(file);
    const codes = [file.error?.code, ...file.findings.map((f) => f.code)];
    const words = [file.path, a?.family, a?.variant, a?.dialect, a?.kind, a?.dtype, ...codes, ...Object.values(a?.metadata ?? {})];
    return {
      ...file,
      index,
      name: names[index],
      family: a ? [a.family, a.variant].filter(Boolean).join(" ") : null,
      dialect: a?.dialect ?? null,
      kind: a?.kind ?? null,
      state,
      copy: group(index, true),
      alike: file.near.length > 0 || group(index, false),
      badness: ["sound", "warnings", "problems", "failed"].indexOf(state) * 1e6 + sum(file.findings.map((f) => f.count)),
      words: words.filter(Boolean).join("\n").toLowerCase(),
    };
  });
}

class FileTable {
  constructor(data, names, open) {
    this.files = listed(data, names);
    this.columns = COLUMNS.filter((c) => data.weights || !c.weights);
    this.open = open;
    this.order = { column: null, down: false };
    this.page = 0;
    this.current = 0;
    this.selects = {};
    this.makeFilters();
    this.makeHead();
    byId("table").tBodies[0].addEventListener("keydown", (e) => this.key(e));
    this.update();
  }

  makeFilters() {
    const choices = (of) => [...new Set(this.files.map(of).filter(Boolean))].sort((a, b) => a.localeCompare(b, "en", { numeric: true })).map((v) => [v, v]);
    const has = { copies: (f) => f.copy, alike: (f) => f.alike };
    this.is = (f, state) => (has[state] ? has[state](f) : f.state === state);
    const states = Object.entries(STATES).filter(([state]) => this.files.some((f) => this.is(f, state)));
    const add = (id, title, options) => {
      const all = el("option", { value: "" }, "any");
      const select = el("select", { id: `by-${id}`, change: () => this.refilter() }, all, options.map(([value, name]) => el("option", { value }, name)));
      byId("clear").before(el("label", {}, el("span", { class: "label" }, title), select));
      this.selects[id] = select;
    };
    add("family", "Family", choices((f) => f.adapter?.family));
    add("dialect", "Dialect", choices((f) => f.dialect));
    add("kind", "Kind", choices((f) => f.kind));
    add("state", "Found", states);
    byId("filter").addEventListener("input", () => this.refilter());
    byId("filter").addEventListener("keydown", (e) => {
      if (e.key !== "ArrowDown") return;
      e.preventDefault();
      this.focus(0);
    });
    byId("filters").addEventListener("submit", (e) => {
      e.preventDefault();
      this.focus(0);
    });
    byId("clear").addEventListener("click", () => this.clear());
  }

  makeHead() {
    const head = this.columns.map((column) => {
      const pressed = button([column.title, el("span", { class: "arrow", "aria-hidden": "true" })], () => this.sort(column));
      return el("th", { scope: "col", class: [column.id, column.number && "number"].filter(Boolean).join(" "), "aria-sort": "none", role: "columnheader" }, pressed);
    });
    byId("table").tHead.replaceChildren(el("tr", { role: "row" }, head));
  }

  /** Once for the natural direction, again for the other one, a third time for the order of the files. */
  sort(column) {
    const { order } = this;
    const first = Boolean(column.number);
    if (order.column !== column) this.order = { column, down: first };
    else if (order.down === first) this.order = { column, down: !first };
    else this.order = { column: null, down: false };
    this.page = 0;
    this.current = 0;
    this.update();
  }

  refilter() {
    this.page = 0;
    this.current = 0;
    this.update();
  }

  clear() {
    byId("filter").value = "";
    for (const select of Object.values(this.selects)) select.value = "";
    this.refilter();
  }

  /** Shows the files of one value alone. */
  pick(id, value) {
    const select = this.selects[id];
    select.value = select.value === value ? "" : value;
    this.refilter();
    byId("files").scrollIntoView({ block: "start" });
  }

  matching() {
    const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const { family, dialect, kind, state } = Object.fromEntries(Object.entries(this.selects).map(([id, s]) => [id, s.value]));
    return this.files.filter((f) =>
      words.every((word) => f.words.includes(word)) &&
      (!family || f.adapter?.family === family) &&
      (!dialect || f.dialect === dialect) &&
      (!kind || f.kind === kind) &&
      (!state || this.is(f, state)));
  }

  /** What is not there comes last in both directions. */
  sorted(files) {
    const { column, down } = this.order;
    if (!column) return files;
    const absent = (x) => x === null || x === undefined;
    const compare = (x, y) => (typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true }));
    return [...files].sort((a, b) => {
      const [x, y] = [column.key(a), column.key(b)];
      if (absent(x) || absent(y)) return Number(absent(x)) - Number(absent(y));
      return (down ? -1 : 1) * compare(x, y) || a.index - b.index;
    });
  }

  update() {
    this.shown = this.sorted(this.matching());
    const all = this.files.length;
    const few = this.shown.length === all ? plural(all, "file") : `${whole(this.shown.length)} of ${plural(all, "file")}`;
    const size = sum(this.shown.map((f) => f.bytes ?? 0));
    byId("count").textContent = this.shown.length ? `${few}, ${bytes(size)}` : "No file fits. Clear the filter to see all.";
    byId("clear").disabled = this.shown.length === all;
    this.columns.forEach((column, i) => {
      const own = this.order.column === column;
      byId("table").tHead.rows[0].cells[i].setAttribute("aria-sort", own ? (this.order.down ? "descending" : "ascending") : "none");
    });
    this.draw();
  }

  draw() {
    const start = this.page * PAGE;
    const rows = this.shown.slice(start, start + PAGE).map((file, i) => this.row(file, start + i));
    byId("table").tBodies[0].replaceChildren(...rows);
    this.drawPager(start);
  }

  row(file, at) {
    const name = el("button", { type: "button", class: "open", tabindex: at === this.current ? 0 : -1, click: () => this.choose(at), focus: () => this.mark(at) },
      file.name.folder && el("span", { class: "folder" }, file.name.folder), el("span", { class: "stem" }, file.name.name));
    const cells = this.columns.slice(1).map((c) => {
      const told = c.cell(file) ?? "–";
      const absent = told === "–" || (Array.isArray(told) && !told.flat().some(Boolean));
      return el("td", { class: [c.id, c.number && "number", absent && "none"].filter(Boolean).join(" "), role: "cell" }, told);
    });
    const open = (e) => e.target.closest("button") || this.choose(at);
    return el("tr", { class: file.error ? "failed" : null, click: open, role: "row" }, el("th", { scope: "row", class: "name", title: file.path, role: "rowheader" }, name), cells);
  }

  drawPager(start) {
    const last = Math.max(0, Math.ceil(this.shown.length / PAGE) - 1);
    byId("pager").hidden = last === 0;
    const go = (page) => () => this.turn(page);
    const end = Math.min(start + PAGE, this.shown.length);
    byId("pager").replaceChildren(
      button("First", go(0), { disabled: this.page === 0 }),
      button("Previous", go(this.page - 1), { disabled: this.page === 0 }),
      el("span", { class: "dim" }, `${whole(start + 1)}–${whole(end)} of ${whole(this.shown.length)}`),
      button("Next", go(this.page + 1), { disabled: this.page === last }),
      button("Last", go(last), { disabled: this.page === last }),
    );
  }

  turn(page) {
    this.page = page;
    this.current = page * PAGE;
    this.draw();
    byId("files").scrollIntoView({ block: "start" });
  }

  choose(at) {
    this.mark(at);
    this.open(this.shown[at].index);
  }

  buttons() {
    return [...byId("table").tBodies[0].querySelectorAll("button.open")];
  }

  /** One row is in the order of tabs. */
  mark(at) {
    this.current = at;
    this.buttons().forEach((b, i) => (b.tabIndex = i + this.page * PAGE === at ? 0 : -1));
  }

  /** Moves to a row, turning the page where it is on another one. */
  focus(at) {
    if (!this.shown.length) return;
    const to = Math.max(0, Math.min(at, this.shown.length - 1));
    const page = Math.floor(to / PAGE);
    this.current = to;
    if (page !== this.page) {
      this.page = page;
      this.draw();
    }
    this.mark(to);
    this.buttons()[to - page * PAGE].focus();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 20, PageUp: -20, Home: -Infinity, End: Infinity };
    const step = steps[event.key];
    if (step === undefined) return;
    event.preventDefault();
    this.focus(Number.isFinite(step) ? this.current + step : step < 0 ? 0 : this.shown.length - 1);
  }

  /** The file so many rows on from one, in the order shown. */
  beside(index, step) {
    const at = this.shown.findIndex((f) => f.index === index);
    return at < 0 ? undefined : this.shown[at + step];
  }
}
