// One file.

const list = (counts, one) => Object.entries(counts).map(([name, n]) => one(name, n)).join(", ");

function notice(level, finding) {
  const count = finding.count > 1 ? ` × ${whole(finding.count)}` : "";
  const rest = finding.count - finding.messages.length;
  return el("li", { class: `notice ${level}` },
    el("p", {}, el("b", {}, level), " ", el("code", {}, finding.code), count),
    finding.messages.map((m) => el("p", {}, marked(m))),
    rest > 0 && el("p", { class: "dim" }, `and ${whole(rest)} more`),
    finding.hint && el("p", { class: "dim" }, marked(finding.hint)),
    finding.command && command(finding.command),
  );
}

function notices(file) {
  const error = file.error && { ...file.error, count: 1, messages: [file.error.message + (file.error.key ? ` (\`${file.error.key}\`)` : "")], command: null };
  const all = [error && notice("error", error), ...file.findings.map((f) => notice(f.level, f))].filter(Boolean);
  return all.length ? el("ul", { class: "notices" }, all) : null;
}

function facts(file) {
  const a = file.adapter;
  const several = a.families.filter((f) => f !== a.family);
  const ranks = a.rank !== null ? a.rank : list(a.ranks, (rank, n) => `${rank} × ${n}`);
  const scales = Object.keys(a.scales);
  const w = a.weights;
  const entries = [
    ["Family", [a.family, a.variant, several.length && `or ${several.join(", ")}`].filter(Boolean).join(" ")],
    ["Dialect", a.coverage < 1 ? `${a.dialect}, ${percent(a.coverage)} of the keys` : a.dialect],
    ["Kind", a.kind],
    ["Modules", list(a.modules, (name, n) => `${whole(n)} ${name}`) || "none"],
    ["Rank", ranks || "–"],
    ["Scale", scales.length > 4 ? `${scales.length} different` : list(a.scales, (s, n) => (scales.length > 1 ? `${s} × ${n}` : s)) || "–"],
    ["Type", Object.keys(a.dtypes).length > 1 ? list(a.dtypes, (t, n) => `${t} × ${n}`) : a.dtype],
    ["Size", `${bytes(file.bytes)}, ${plural(a.tensors, "tensor")}`],
    w && ["Norm", digits(w.norm)],
    w && w.effective_rank !== null && ["Effective rank", `${digits(w.effective_rank)} (median)`],
    w && w.stable_rank !== null && ["Stable rank", `${digits(w.stable_rank)} (median)`],
    a.native && ["Base", a.native.base ?? "not named"],
    a.native && a.native.adapters.length && ["Adapters inside", a.native.adapters.map((l) => l.name).join(", ")],
  ];
  return el("dl", { class: "facts" }, entries.filter(Boolean).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function part(title, ...content) {
  return el("section", {}, el("h3", {}, title), content);
}

function blockPart(w) {
  const rows = w.blocks.map((b) => [b.component, b.block ?? "outside of blocks", b.modules, digits(b.norm), percent(b.share), digits(b.effective_rank)]);
  const table = plainTable("Blocks", ["Component", "Block", "Modules", "Norm", "Share", "Effective rank"], rows, [2, 3, 4, 5]);
  const numbers = el("details", {}, el("summary", {}, "Numbers"), el("div", { class: "scroll" }, table));
  return part("Norm by block", w.norm > 0 ? blockColumns(w.blocks) : el("p", { class: "dim" }, "There is nothing to draw: norms are zero, or not finite."), numbers);
}

function energyPart(w) {
  if (!w.kept.length) return null;
  const marks = Object.entries(w.rank_for_energy).sort((a, b) => a[0] - b[0]);
  if (w.values.length < 2) return null;
  const told = marks.map(([share, rank]) => el("li", {}, el("b", {}, percent(Number(share))), ` rank ${rank}`));
  const best = w.smaller && [el("p", {}, "A resize to ", el("b", {}, w.smaller.rank), " keeps ", el("b", {}, percent(w.smaller.kept)), ` of the energy (relative error ${digits(Math.sqrt(Math.max(0, 1 - w.smaller.kept)))}).`), command(w.smaller.command)];
  const spectrum = el("figure", {}, el("figcaption", {}, "Singular values, all modules together"), spectrumChart(w.values));
  const energy = el("figure", {}, el("figcaption", {}, "Energy kept, every module cut to one rank"), energyChart(w.kept, [...new Set(marks.map((m) => m[1]))]));
  return part("Rank", el("div", { class: "two" }, spectrum, energy), el("p", { class: "dim" }, "The smallest rank that keeps"), el("ul", { class: "chips" }, told), best);
}

function modulePart(w) {
  const rows = w.largest.map((m) => [el("code", {}, m.module), m.rank ?? "–", digits(m.norm), percent(m.share), digits(m.effective_rank)]);
  const table = rows.length ? el("div", { class: "scroll" }, plainTable("Largest modules", ["Module", "Rank", "Norm", "Share", "Effective rank"], rows, [1, 2, 3, 4])) : null;
  const named = (names, words) => names.count > 0 && el("details", {}, el("summary", {}, `${plural(names.count, "module")} ${words}`), el("ul", { class: "names" }, names.first.map((n) => el("li", {}, el("code", {}, n))), names.count > names.first.length && el("li", {}, `and ${whole(names.count - names.first.length)} more`)));
  const one = (names, singular, several) => named(names, names.count === 1 ? singular : several);
  return part("Largest modules", table, one(w.dead, "does nothing", "do nothing"), one(w.not_finite, "is not finite", "are not finite"));
}

function twinPart(data, i, names, show) {
  const link = (j) => button(names[j].label, () => show(j), { class: "link", title: data.files[j].path });
  const groups = data.groups.filter((g) => g.files.includes(i)).map((g) => {
    const others = g.files.filter((j) => j !== i);
    const shown = others.slice(0, 8).map(link);
    return el("li", {}, el("p", {}, el("b", {}, RELATIONS[g.relation])), el("div", { class: "links" }, shown, others.length > 8 && `and ${others.length - 8} more`), g.command && command(g.command));
  });
  const near = data.files[i].near.map((n) => el("li", {}, el("p", {}, el("b", {}, "nearly the same"), `: ${likeness(n)}`), el("div", { class: "links" }, link(n.file)), command(n.command)));
  return groups.length + near.length ? part("Duplicates", el("ul", { class: "twins" }, groups, near)) : null;
}

function loaderPart(loaders) {
  if (!loaders.length) return null;
  const answer = (a) => (a.loads === "yes" ? "good" : a.loads === "not known" ? "dim" : "unsure");
  const rows = loaders.map((a) => [a.programs.join(", "), el("div", {}, el("p", { class: answer(a) }, a.loads), a.command && command(a.command))]);
  return part("Who loads it", el("div", { class: "scroll programs" }, plainTable("Programs that load it", ["Program", "Loads it"], rows)));
}

function metadataPart(a) {
  const known = Object.entries(a.metadata);
  if (!known.length) return null;
  const rest = a.metadata_entries - known.length;
  const entries = known.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)));
  return part("Metadata", el("dl", { class: "facts wide" }, entries), rest > 0 && el("p", { class: "dim" }, `and ${plural(rest, "entry", "entries")} more`));
}

/** All there is to say about file `i`. */
function detail(data, i, names, show) {
  const file = data.files[i];
  const a = file.adapter;
  const w = a && a.weights;
  return [
    el("p", { class: "path" }, file.path),
    notices(file),
    a && facts(file),
    twinPart(data, i, names, show),
    w && w.blocks.length > 0 && blockPart(w),
    w && energyPart(w),
    w && modulePart(w),
    a && loaderPart(a.loaders),
    a && metadataPart(a),
  ].filter(Boolean);
}
