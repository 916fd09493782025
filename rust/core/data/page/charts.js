// Charts, each an SVG of as many pixels as its place has. All of them have their numbers beside them as text.

/** Redraws a chart whenever its place changes its width. */
function responsive(height, label, draw) {
  const place = el("div", { class: "chart", role: "img", "aria-label": label });
  let width = 0;
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now === width || now < 40) return;
    width = now;
    place.replaceChildren(drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}` }, draw(width, height)));
  }).observe(place);
  return place;
}

const text = (x, y, anchor, words) => drawn("text", { x, y, "text-anchor": anchor }, words);
const rule = (x1, y1, x2, y2, kind = "grid") => drawn("line", { x1, y1, x2, y2, class: kind });

/** A bar for each value, the longest as wide as its place. */
function barList(title, entries, picked) {
  const most = Math.max(...entries.map((e) => e.count));
  const rows = entries.map(({ name, count, value }) => {
    const bar = drawn("svg", { class: "bar", "aria-hidden": "true" }, drawn("rect", { width: `${(100 * count) / most}%`, height: "100%", rx: 2 }));
    const pick = picked && value !== undefined ? () => picked(value) : null;
    return el("li", { class: pick ? "pick" : null, click: pick, title: pick ? `Show ${name} only` : null }, el("span", { class: "name" }, name), bar, el("span", { class: "number" }, whole(count)));
  });
  return el("figure", {}, el("figcaption", {}, title), el("ul", { class: "bars" }, rows));
}

/** The block's path without its number, and the number. */
function blockName(block) {
  const at = block === null ? null : block.match(/^(.*?)[._]?(\d+)$/);
  return at ? { stem: at[1], number: Number(at[2]) } : { stem: block ?? "outside of blocks", number: null };
}

/** Round numbers from 0 to at least `most`. */
function ticks(most, about) {
  if (!(most > 0)) return [0];
  const rough = most / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
  return Array.from({ length: Math.ceil(most / step - 1e-9) + 1 }, (_, i) => i * step);
}

/** Norms block by block: one run of columns for each row of blocks. */
function blockColumns(blocks) {
  const runs = [];
  for (const block of blocks) {
    const { stem, number } = blockName(block.block);
    const last = runs.at(-1);
    if (last && last.component === block.component && last.stem === stem) last.blocks.push({ ...block, number });
    else runs.push({ component: block.component, stem, blocks: [{ ...block, number }] });
  }
  const most = Math.max(...blocks.map((b) => b.norm));
  const labels = ticks(most, 3);
  const top = Math.max(labels.at(-1), Number.MIN_VALUE);
  return responsive(190, `Norm of each of ${plural(blocks.length, "block")}; the numbers are in the table below`, (width, height) => {
    const [left, bottom, gap] = [44, height - 34, 14];
    const slot = Math.min(64, (width - left - 4 - gap * (runs.length - 1)) / blocks.length);
    const y = (value) => bottom - (value / top) * (bottom - 10);
    const out = labels.map((v) => [rule(left, y(v), width, y(v)), text(left - 6, y(v) + 4, "end", digits(v))]);
    let x = left + 2;
    for (const run of runs) {
      const start = x;
      for (const block of run.blocks) {
        const name = `${block.component}.${block.block ?? "outside of blocks"}`;
        const told = drawn("title", {}, `${name}\nnorm ${digits(block.norm)}, ${percent(block.share)} of the energy`);
        const wide = Math.max(slot - (slot > 4 ? 1.5 : 0.5), 0.5);
        out.push(drawn("rect", { x, y: y(block.norm), width: wide, height: Math.max(bottom - y(block.norm), 0.5), class: "column" }, told));
        x += slot;
      }
      out.push(runLabel(run, start, x, bottom));
      x += gap;
    }
    return out;
  });
}

/** What a run of columns is, as far as there is room. */
function runLabel(run, start, end, bottom) {
  const room = Math.floor((end - start + 10) / 6.2);
  const fit = (words) => (words.length <= room ? words : room > 4 ? `${words.slice(0, room - 1)}…` : "");
  const numbers = run.blocks.map((b) => b.number).filter((n) => n !== null);
  const range = numbers.length > 1 ? `${numbers[0]}–${numbers.at(-1)}` : numbers.join("");
  const middle = (start + end) / 2;
  const words = [text(middle, bottom + 14, "middle", fit(run.stem)), text(middle, bottom + 28, "middle", fit(range))];
  return [rule(start, bottom + 0.5, end - 1, bottom + 0.5, "axis"), ...words];
}

/** Which ranks have a label. */
function rankLabels(count, width) {
  const every = [1, 2, 4, 8, 16, 32, 64].find((n) => count / n <= width / 42) ?? 128;
  return Array.from({ length: count }, (_, i) => i + 1).filter((k) => k === 1 || k % every === 0);
}

/** A frame with ranks below, and for every rank a column that tells its value. */
function rankFrame(width, height, count, told) {
  const [left, right, bottom] = [44, width - 8, height - 22];
  const x = (k) => (count === 1 ? (left + right) / 2 : left + ((k - 1) / (count - 1)) * (right - left));
  const half = count === 1 ? 20 : (right - left) / (count - 1) / 2;
  const below = rankLabels(count, right - left).map((k) => text(x(k), bottom + 16, "middle", k));
  const columns = Array.from({ length: count }, (_, i) =>
    drawn("rect", { x: x(i + 1) - half, y: 0, width: 2 * half, height: bottom, class: "touch" }, drawn("title", {}, told(i))),
  );
  return { left, right, bottom, x, below, columns };
}

/** Singular values on a logarithmic scale, relative to the largest. */
function spectrumChart(values) {
  const shares = values.map((v) => v / values[0]).filter((v) => v > 0);
  const decades = Math.max(1, Math.min(8, Math.ceil(-Math.log10(shares.at(-1)) - 1e-9)));
  const least = `${digits(shares.at(-1))} of the largest`;
  return responsive(180, `${plural(shares.length, "singular value")}, falling to ${least}`, (width, height) => {
    const told = (i) => `${i + 1}: ${digits(values[i])}, ${digits(shares[i])} of the largest`;
    const f = rankFrame(width, height, shares.length, told);
    const y = (share) => 10 + (Math.min(-Math.log10(share), decades) / decades) * (f.bottom - 10);
    const step = decades > 4 ? 2 : 1;
    const grid = Array.from({ length: decades + 1 }, (_, d) => d).filter((d) => d % step === 0);
    const lines = grid.map((d) => [rule(f.left, y(10 ** -d), width, y(10 ** -d)), text(f.left - 6, y(10 ** -d) + 4, "end", ["1", "0.1", "0.01"][d] ?? `1e-${d}`)]);
    const points = shares.map((s, i) => `${f.x(i + 1).toFixed(1)},${y(s).toFixed(1)}`);
    const dots = shares.length <= 40 ? shares.map((s, i) => drawn("circle", { cx: f.x(i + 1), cy: y(s), r: 2.5, class: "dot" })) : [];
    return [lines, f.below, drawn("polyline", { points: points.join(" "), class: "line" }), dots, f.columns];
  });
}

/** The share of the energy that each rank keeps. */
function energyChart(kept, marks) {
  return responsive(180, `Energy kept by rank, from ${percent(kept[0])} by rank 1`, (width, height) => {
    const told = (i) => `rank ${i + 1} keeps ${percent(kept[i])}`;
    const f = rankFrame(width, height, kept.length, told);
    const y = (share) => 10 + (1 - share) * (f.bottom - 10);
    const lines = [0, 0.25, 0.5, 0.75, 1].map((s) => [rule(f.left, y(s), width, y(s)), text(f.left - 6, y(s) + 4, "end", `${100 * s} %`)]);
    const points = kept.map((s, i) => `${f.x(i + 1).toFixed(1)},${y(s).toFixed(1)}`);
    const area = [`${f.x(1)},${f.bottom}`, ...points, `${f.x(kept.length)},${f.bottom}`].join(" ");
    const drops = marks.filter((rank) => rank <= kept.length).map((rank) => [
      rule(f.x(rank), y(kept[rank - 1]), f.x(rank), f.bottom, "drop"),
      drawn("circle", { cx: f.x(rank), cy: y(kept[rank - 1]), r: 3.5, class: "dot" }),
    ]);
    return [lines, f.below, drawn("polygon", { points: area, class: "area" }), drawn("polyline", { points: points.join(" "), class: "line" }), drops, f.columns];
  });
}
