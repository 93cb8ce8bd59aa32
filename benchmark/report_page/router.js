const ROUTERS = { item: "Item router", window: "Window router", experts: "Router" };
const routerName = (name) => ROUTERS[name] || name;
const nounOf = (name) => (name === "experts" ? "expert" : "theme");

function buildRouters(run) {
  const parts = [make("h3", {}, "Routers")];
  if (!run.method) return [...parts, make("p", {}, "A plain backbone has no router.")];
  const loads = unique(run.history.flatMap((entry) => Object.keys(entry.load))).map((name) => loadChart(run, name)).filter(Boolean);
  parts.push(loads.length ? make("div", { class: "grid" }, loads)
    : make("p", {}, "The record has no load by theme: none of its evaluations routed anything."));
  for (const [name, figures] of Object.entries(run.routers)) {
    const told = Object.entries(figures).map(([key, value]) => `${key.replaceAll("_", " ")} ${short(value)}`);
    if (told.length) parts.push(make("p", { class: "quiet" }, `${routerName(name)}, final model: ${told.join(" · ")}`));
  }
  if (!run.view) return [...parts, make("p", {}, run.no_view || "No router view.")];
  for (const branch of run.view.branches) parts.push(...buildThemes(branch, run));
  return [...parts, ...buildSequences(run.view)];
}

function loadChart(run, name) {
  const columns = run.history.filter((entry) => Array.isArray(entry.load[name]) && entry.load[name].every(isNumber))
    .map((entry) => ({ name: `${entry.phase}\nepoch ${entry.epoch ?? "?"}`, shares: entry.load[name] }));
  const what = name === "experts" ? "Share of the readings that each expert has" : "Share of tokens whose nearest theme it is";
  return columns.length ? stackedColumns(`${routerName(name)}: load per ${nounOf(name)} over training`, columns,
    `${what}, of the first validation batches, at each evaluation.`, nounOf(name)) : null;
}

function buildThemes(branch, run) {
  const features = Object.keys(branch.categories);
  const cards = make("div", { class: "grid" });
  const show = (feature) => cards.replaceChildren(...branch.share.map((share, theme) => themeCard(branch, theme, share, feature)));
  const [label] = chooser("categories by", features.map((name) => [name, name]), show);
  show(features[0]);
  return [make("h3", {}, `${routerName(branch.name)}: what each ${nounOf(branch.name)} holds`),
    make("p", { class: "quiet" }, `${count(branch.tokens)} ${branch.name === "window" ? "windows" : "tokens"} of the first ` +
      `${count(run.view.rows)} validation rows; ` +
      `${branch.unread ? `${count(branch.unread)} are read by no expert` : "every one is read by an expert"}. Popular are the fifth of ` +
      `all items that histories hold most often: ${percent(branch.popular_overall)} of all readings. × compares a category's share ` +
      `in the ${nounOf(branch.name)} with its share in all readings, which the bar's mark shows. Items and categories go by their ` +
      `numbers in the data files.`),
    features.length > 1 ? make("div", { class: "controls" }, label) : null, cards];
}

function themeCard(branch, theme, share, feature) {
  const categories = feature ? branch.categories[feature][theme] : [];
  return make("div", { class: "card" },
    make("h4", {}, make("span", { class: "key" },
      make("span", {}, swatch(theme), `${nounOf(branch.name)} ${theme}: ${percent(share)} of the readings`))),
    make("p", { class: "quiet" }, `${count(branch.distinct[theme])} distinct items; ${percent(branch.popular[theme])} of its ` +
      "readings are of popular ones"),
    categories.length ? make("table", { class: "bars" }, make("thead", { class: "hidden" }, make("tr", {},
      [feature, "share, drawn", "share", "against all"].map((title) => make("th", { scope: "col" }, title)))),
    make("tbody", {}, categories.map(([value, inTheme, overall]) => make("tr", {},
      make("th", { scope: "row", class: "text" }, `${feature} ${value}`),
      make("td", { class: "wide-cell" }, shareBar(inTheme, overall, theme)), make("td", {}, percent(inTheme)),
      make("td", {}, overall > 0 ? `×${(inTheme / overall).toFixed(1)}` : ""))))) : null,
    branch.items[theme].length ? make("p", { class: "quiet" }, "Most read items: " +
      branch.items[theme].map(([item, times]) => `${item} (${count(times)})`).join(", "))
      : make("p", { class: "quiet" }, "Nothing is routed to it."));
}

function shareBar(share, overall, theme) {
  return ofHeight(10, draw("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    draw("rect", { class: "band", width: 100, height: 10 }),
    draw("rect", { width: 100 * share, height: 10, fill: themeColour(theme) }),
    draw("rect", { class: "overall", x: Math.max(100 * overall - 0.6, 0), width: 1.2, height: 10 })));
}

// A drawing that is stretched to its place's width, but not in height.
function ofHeight(height, svg) {
  svg.style.height = `${height}px`;
  return svg;
}

function buildSequences(view) {
  if (!view.sequences.length) return [];
  const themes = Math.max(...view.branches.map((branch) => branch.share.length));
  const longest = Math.max(...view.sequences.map((sequence) => sequence.items.length));
  const parts = [make("h3", {}, `Histories coloured by ${nounOf(view.branches[0].name)}`),
    make("p", { class: "quiet" }, `Users of the first validation batch, from long to short histories; oldest item left, newest right, the newest ` +
      `${count(longest)} at most. Where a token has several themes, the nearest stands on top. Windows: one cell each, oldest first.`),
    themeKey(themes, nounOf(view.branches[0].name))];
  for (const sequence of view.sequences) {
    const row = make("div", { class: "strip" });
    Object.entries(sequence.themes).forEach(([name, tokens]) => {
      row.append(make("span", { class: "quiet" }, name === "window" ? plural(tokens.length, "window") : plural(sequence.length, "item")),
        name === "window" ? strip(tokens, tokens.length, null, view, "windows", sequence.items.length / longest)
          : strip(tokens, longest, sequence, view, "items", 1));
    });
    parts.push(row);
  }
  return parts;
}

// tokens: [[themes]], oldest first; they stand at the right end of a strip of so many slots.
function strip(tokens, slots, sequence, view, what, share) {
  const rows = Math.max(1, ...tokens.map((token) => token.length));
  const height = rows > 1 ? 10 * rows : 16, cell = (1000 * share) / Math.max(slots, 1);
  const svg = ofHeight(height, draw("svg", { viewBox: `0 0 1000 ${height}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `Themes of the ${what}, oldest first: ${runsOf(tokens)}` }));
  const first = 1000 - cell * tokens.length;
  tokens.forEach((token, at) => token.slice(0, rows).forEach((theme, row) => {
    const told = sequence ? `item ${sequence.items[at]}${sequence.labels ? `, ${view.label} ${sequence.labels[at]}` : ""}\n` : "";
    svg.append(draw("rect", { class: "cell", x: (first + cell * at).toFixed(2), y: (height / rows) * row, width: cell.toFixed(2),
      height: height / rows, fill: themeColour(theme) }, draw("title", {}, `${told}theme ${token.join(", ")}`)));
  }));
  return svg;
}

function runsOf(tokens) {
  const told = [];
  let before = null, times = 0;
  for (const theme of [...tokens.map((token) => (token.length ? token[0] : "none")), null]) {
    if (theme === before) times += 1;
    else {
      if (before !== null) told.push(times > 1 ? `${before} (${times} times)` : String(before));
      [before, times] = [theme, 1];
    }
  }
  return told.join(", ");
}
