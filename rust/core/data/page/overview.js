// Totals, what the files are, and which of them are the same.

/** Where a file stands: the worst that was found of it. */
function standing(file) {
  if (file.error) return "failed";
  const level = (name) => file.findings.some((f) => f.level === name);
  return level("problem") ? "problems" : level("warning") ? "warnings" : "sound";
}

function showTotals(data, filter) {
  const t = data.totals;
  const figures = [
    { number: whole(t.files), words: t.files === 1 ? "file" : "files" },
    { number: bytes(t.bytes), words: "in all" },
    { number: whole(t.families), words: t.families === 1 ? "family" : "families" },
    { number: whole(t.dialects), words: t.dialects === 1 ? "dialect" : "dialects" },
    { number: whole(t.failed), words: "not readable", state: "failed", kind: t.failed ? "bad" : null },
    { number: whole(t.problems), words: "with problems", state: "problems", kind: t.problems ? "bad" : null },
    { number: whole(t.warnings), words: "with warnings", state: "warnings", kind: t.warnings ? "unsure" : null },
  ];
  if (data.weights) {
    const spare = t.duplicates ? `${t.duplicates === 1 ? "copy" : "copies"}, ${bytes(t.duplicate_bytes)}` : "copies";
    figures.push({ number: whole(t.duplicates), words: spare, state: "copies" });
    figures.push({ number: whole(t.similar), words: "much alike", state: "alike" });
  }
  const tile = (f) => {
    const inside = [el("strong", { class: f.kind }, f.number), el("span", {}, f.words)];
    const live = f.state && f.number !== "0";
    return live ? el("button", { type: "button", click: () => filter(f.state), title: "Show these files" }, inside) : el("div", {}, inside);
  };
  byId("totals").replaceChildren(...figures.map(tile));
}

/** How often each value occurs, the most frequent first; what is rare is one entry together. */
function counted(values, shown = 6) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  const entries = [...counts].map(([name, count]) => ({ name, count, value: name }));
  entries.sort((a, b) => b.count - a.count || String(a.name).localeCompare(String(b.name), "en", { numeric: true }));
  if (entries.length <= shown + 1) return entries;
  const rest = entries.slice(shown);
  return [...entries.slice(0, shown), { name: `${rest.length} others`, count: sum(rest.map((e) => e.count)) }];
}

const SIZES = [1, 4, 16, 64, 256, 1024];

/** Files by their size, in steps of four. */
function sizes(files) {
  const edge = (mib) => bytes(mib * 2 ** 20);
  const names = [`below ${edge(1)}`, ...SIZES.slice(1).map((m, i) => `${edge(SIZES[i]).replace(/ \w+$/, "")}–${edge(m)}`), `over ${edge(1024)}`];
  const counts = names.map((name) => ({ name, count: 0 }));
  for (const file of files) {
    const over = SIZES.findIndex((m) => file.bytes < m * 2 ** 20);
    counts[over < 0 ? SIZES.length : over].count += 1;
  }
  return counts.filter((c) => c.count > 0);
}

function showCharts(files, pick) {
  const read = files.filter((f) => f.adapter);
  if (read.length < 2) return;
  const by = (of) => counted(read.map((f) => of(f.adapter)));
  const plain = (entries) => entries.map(({ name, count }) => ({ name, count }));
  const rank = (a) => (a.rank !== null ? a.rank : Object.keys(a.ranks).length ? "several" : "none");
  const ranks = plain(by(rank)).sort((a, b) => (Number(a.name) || 1e9) - (Number(b.name) || 1e9));
  byId("charts").replaceChildren(
    barList("Family", by((a) => a.family), (v) => pick("family", v)),
    barList("Dialect", by((a) => a.dialect), (v) => pick("dialect", v)),
    barList("Kind", by((a) => a.kind), (v) => pick("kind", v)),
    barList("Rank", ranks),
    barList("Type", plain(by((a) => a.dtype))),
    barList("Size", sizes(read)),
  );
  byId("charts").hidden = false;
}

const RELATIONS = {
  file: "the same bytes",
  tensors: "the same tensors, other metadata",
  delta: "the same effect in other forms",
};

/** How like two files are, in words. */
function likeness(near) {
  const times = Math.abs(near.ratio - 1) > 0.01 ? `, × ${digits(near.ratio)}` : "";
  const error = near.error >= 5e-5 ? ` ± ${near.error.toFixed(4)}` : "";
  const cosine = Math.abs(near.cosine).toFixed(near.error >= 5e-5 ? 4 : 6).replace(/(\.\d\d)0+$/, "$1");
  const sign = near.cosine < 0 ? "−" : "";
  return `cosine ${sign}${cosine}${error}${times}${near.partial ? ", of what can be compared" : ""}`;
}

/** Pairs of files, each once, the most like first. */
function pairs(files) {
  const out = [];
  files.forEach((file, i) => {
    for (const near of file.near) {
      const known = files[near.file].near.some((n) => n.file === i);
      if (near.file > i || !known) out.push({ from: i, near });
    }
  });
  return out.sort((a, b) => Math.abs(b.near.cosine) - Math.abs(a.near.cosine));
}

const PAIRS = 50;

function showAlike(data, names, show) {
  const link = (i) => button(names[i].name, () => show(i), { class: "link", title: data.files[i].path });
  const groups = data.groups.map((g) => {
    const spare = g.spare_bytes ? `${bytes(g.spare_bytes)} to spare` : "";
    return [RELATIONS[g.relation], el("div", { class: "links" }, g.files.slice(0, 12).map(link), g.files.length > 12 && `and ${g.files.length - 12} more`), spare];
  });
  const near = pairs(data.files);
  const close = near.slice(0, PAIRS).map(({ from, near: n }) => ["nearly the same", el("div", { class: "links" }, link(from), link(n.file)), likeness(n)]);
  if (!groups.length && !close.length) return;
  const both = [groups.length && plural(groups.length, "group of the same", "groups of the same"), near.length && plural(near.length, "pair nearly the same", "pairs nearly the same")];
  const heading = el("summary", {}, el("h2", {}, "Duplicates"), el("span", { class: "dim" }, both.filter(Boolean).join(", ")));
  const more = near.length > PAIRS ? el("p", { class: "dim" }, `and ${whole(near.length - PAIRS)} more pairs: see the files`) : null;
  const rows = [...groups, ...close];
  const table = plainTable("Files that are the same or nearly", ["What", "Files", "How much"], rows);
  byId("alike").replaceChildren(el("details", { open: rows.length <= 8 }, heading, table, more));
  byId("alike").hidden = false;
}
