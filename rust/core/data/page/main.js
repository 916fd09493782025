// Puts the page together.

/** Folder and name of each file, without what all of them have in common. */
function shortNames(paths) {
  const parts = paths.map((path) => path.split("/"));
  let common = parts.length > 1 ? Math.min(...parts.map((p) => p.length - 1)) : parts[0].length - 1;
  while (common > 0 && !parts.every((p) => p.slice(0, common).join("/") === parts[0].slice(0, common).join("/"))) common -= 1;
  return parts.map((p) => {
    const rest = p.slice(common);
    const folder = rest.slice(0, -1).map((f) => `${f}/`).join("");
    return { folder, name: rest.at(-1) || p.join("/"), label: folder + rest.at(-1) };
  });
}

/** Light or dark: what the system says, until the button says something else. */
function themeButton() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => {
    try {
      return localStorage.getItem("lorafmt-theme");
    } catch {
      return null;
    }
  };
  let chosen = ["light", "dark"].includes(stored()) ? stored() : null;
  const dark = () => (chosen ? chosen === "dark" : system.matches);
  const show = () => {
    root.dataset.theme = dark() ? "dark" : "light";
    byId("theme").textContent = dark() ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", dark() ? "Use light colours" : "Use dark colours");
  };
  byId("theme").addEventListener("click", () => {
    chosen = dark() ? "light" : "dark";
    try {
      localStorage.setItem("lorafmt-theme", chosen);
    } catch {
      // A page that may not remember forgets.
    }
    show();
  });
  system.addEventListener("change", show);
  show();
}

/** The window with one file. */
class Viewer {
  constructor(data, names) {
    this.data = data;
    this.names = names;
    this.node = byId("dialog");
    this.index = null;
    this.node.addEventListener("close", () => this.closed());
    this.node.addEventListener("click", (e) => e.target === this.node && this.node.close());
    this.node.addEventListener("keydown", (e) => this.key(e));
  }

  show(index) {
    this.index = index;
    const step = (by, words) => {
      const beside = this.table.beside(index, by);
      return button(words, () => this.show(beside.index), { class: "quiet", disabled: !beside, "aria-label": by < 0 ? "The file before" : "The file after" });
    };
    const close = button("Close", () => this.node.close(), { class: "quiet" });
    const head = el("header", {}, el("h2", { id: "dialog-name", tabindex: -1 }, this.names[index].name), el("div", { class: "steps" }, step(-1, "←"), step(1, "→"), close));
    const body = el("div", { class: "body" }, detail(this.data, index, this.names, (i) => this.show(i)));
    this.node.replaceChildren(head, body);
    if (!this.node.open) this.node.showModal();
    byId("dialog-name").focus();
    history.replaceState(null, "", `#file-${index + 1}`);
  }

  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
    const beside = this.table.beside(this.index, by);
    if (beside) this.show(beside.index);
  }

  closed() {
    history.replaceState(null, "", location.pathname + location.search);
    const at = this.table.shown.findIndex((f) => f.index === this.index);
    if (at >= 0) this.table.focus(at);
  }
}

function showOne(data, names) {
  const only = names[0];
  document.title = `${visible(only.name)} – lorafmt report`;
  byId("title").textContent = visible(only.name);
  byId("single").replaceChildren(...detail(data, 0, names, () => {}));
  byId("single").hidden = false;
}

function showMany(data, names) {
  document.title = `${plural(data.totals.files, "adapter file")} – lorafmt report`;
  const viewer = new Viewer(data, names);
  const table = new FileTable(data, names, (i) => viewer.show(i));
  viewer.table = table;
  showTotals(data, (state) => table.pick("state", state));
  showCharts(data.files, (id, value) => table.pick(id, value));
  showAlike(data, names, (i) => viewer.show(i));
  byId("totals").hidden = false;
  byId("files").hidden = false;
  document.addEventListener("keydown", (e) => {
    const typing = e.target instanceof HTMLInputElement || e.target instanceof HTMLSelectElement;
    if (e.key !== "/" || typing || viewer.node.open || e.ctrlKey || e.metaKey || e.altKey) return;
    e.preventDefault();
    byId("filter").focus();
    byId("filter").select();
  });
  const wanted = /^#file-(\d+)$/.exec(location.hash);
  if (wanted && data.files[wanted[1] - 1]) viewer.show(wanted[1] - 1);
}

themeButton();
const data = JSON.parse(byId("data").textContent);
const names = shortNames(data.files.map((f) => f.path));
const when = new Date(data.created * 1000);
const read = data.weights ? "weights measured" : "headers only";
byId("made").textContent = `lorafmt ${data.version} · ${when.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" })} · ${read}`;
if (data.files.length === 1) showOne(data, names);
else showMany(data, names);
