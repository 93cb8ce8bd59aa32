// One line a configuration, over its seeds, or one a run.
function leaderboardRows(each) {
  const groups = each ? page.runs.map((run) => [run]) : [...groupBy(page.runs, (run) =>
    JSON.stringify([run.dataset, run.data, run.max_len, run.head, run.model, run.expid, run.config_digest])).values()];
  return groups.map((runs) => {
    const bySeed = new Map(); // of equal runs the latest counts
    for (const run of [...runs].sort((a, b) => (a.finished < b.finished ? -1 : 1))) bySeed.set(run.seed, run);
    const kept = [...bySeed.values()].sort((a, b) => a.seed - b.seed);
    const over = (read) => {
      const values = kept.map(read).filter(isNumber);
      return { mean: values.length ? mean(values) : null, sd: deviation(values), count: values.length };
    };
    const first = kept[0];
    return {
      first, model: first.model, backbone: first.backbone, method: first.method || "plain", dataset: first.dataset,
      length: first.max_len, head: first.head, expid: first.expid, seeds: kept.map((run) => run.seed),
      scores: Object.fromEntries(page.metrics.map((metric) => [metric, over((run) => (run.scores[page.split] || {})[metric])])),
      parameters: over((run) => run.parameters).mean, flops: over((run) => run.flops).mean,
      seconds: over((run) => run.seconds).mean, memory: over((run) => run.peak_mib).mean,
    };
  });
}

function buildLeaderboard(parent) {
  const place = (row) => JSON.stringify([row.dataset, row.length, row.head]);
  const known = (read) => page.runs.some((run) => isNumber(read(run)));
  const columns = [
    { title: "model", text: true, key: (row) => row.model,
      cell: (row) => make("a", { href: `#run-${page.runs.indexOf(row.first)}` }, row.model) },
    { title: "data set", text: true, key: (row) => row.dataset, cell: (row) => row.dataset },
    { title: "length", key: (row) => row.length, cell: (row) => count(row.length) },
    unique(page.runs.map((run) => run.head)).length > 1 && { title: "head", text: true, key: (row) => row.head, cell: (row) => row.head },
    { title: "seeds", key: (row) => row.seeds.length, cell: (row, each) => (each ? String(row.seeds[0]) : String(row.seeds.length)),
      tip: (row) => `seeds ${row.seeds.join(", ")}` },
    ...page.metrics.map((metric) => ({
      title: metric, metric, falls: !isLoss(metric), key: (row) => row.scores[metric].mean,
      cell: (row) => [score(row.scores[metric].mean, metric), row.scores[metric].sd === null ? null
        : make("span", { class: "sd" }, ` ± ${score(row.scores[metric].sd, metric)}`)],
      tip: (row) => (isNumber(row.scores[metric].mean) ? row.scores[metric].mean.toFixed(6) : "no value"),
    })),
    known((run) => run.parameters) && { title: "parameters", key: (row) => row.parameters, cell: (row) => short(row.parameters) },
    known((run) => run.flops) && { title: "FLOPs a row", key: (row) => row.flops, cell: (row) => short(row.flops) },
    known((run) => run.seconds) && { title: "time", key: (row) => row.seconds, cell: (row) => duration(row.seconds) },
    known((run) => run.peak_mib) && { title: "memory, MiB", key: (row) => row.memory, cell: (row) => count(row.memory) },
    { title: "experiment", text: true, key: (row) => row.expid, cell: (row) => row.expid },
  ].filter(Boolean);
  let order = null, each = false;
  const chosen = { dataset: "", backbone: "", method: "", length: "" };
  const status = make("p", { class: "quiet", "aria-live": "polite" });
  const heads = columns.map((column, at) => make("th", { scope: "col", class: column.text ? "text" : null },
    make("button", { type: "button", onclick: () => sortBy(at) }, column.title, make("span", { "aria-hidden": "true" }, ""))));
  const body = make("tbody");

  function sortBy(at) {
    const falls = order && order.at === at ? !order.falls : Boolean(columns[at].falls);
    order = { at, falls };
    show();
  }

  function compareKeys(a, b, falls) {
    const empty = (value) => value === null || value === undefined || value === "";
    if (empty(a) || empty(b)) return empty(a) - empty(b); // what is missing stands last, whatever the direction
    const found = typeof a === "number" ? a - b : String(a).localeCompare(String(b));
    return falls ? -found : found;
  }

  function show() {
    const all = leaderboardRows(each);
    const rows = all.filter((row) => Object.entries(chosen).every(([name, value]) => !value || String(row[name]) === value));
    const metric = columns.find((column) => column.metric);
    rows.sort((a, b) => (order
      ? compareKeys(columns[order.at].key(a), columns[order.at].key(b), order.falls)
      : a.dataset.localeCompare(b.dataset) || (a.length ?? 0) - (b.length ?? 0) || a.head.localeCompare(b.head)
        || (metric ? compareKeys(metric.key(a), metric.key(b), metric.falls) : 0)));
    const best = {};
    for (const { metric: name } of columns.filter((column) => column.metric)) {
      for (const [where, group] of groupBy(rows, place)) {
        const values = group.map((row) => row.scores[name].mean).filter(isNumber);
        if (group.length > 1 && values.length) best[where + name] = isLoss(name) ? Math.min(...values) : Math.max(...values);
      }
    }
    heads.forEach((head, at) => {
      const sorted = order && order.at === at;
      if (sorted) head.setAttribute("aria-sort", order.falls ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
      head.querySelector("span").textContent = sorted ? (order.falls ? " ▾" : " ▴") : "";
    });
    body.replaceChildren(...rows.map((row) => make("tr", {}, columns.map((column, at) => make(at ? "td" : "th", {
      scope: at ? null : "row", title: column.tip ? column.tip(row) : null,
      class: column.text ? "text" : column.metric && column.key(row) === best[place(row) + column.metric] ? "best" : null,
    }, column.cell(row, each))))));
    status.textContent = `${rows.length} of ${all.length} ${each ? "runs" : "configurations"}; scores on ${page.split}, in percent ` +
      `but for losses${each ? "" : ", mean ± standard deviation over seeds"}; the best of each data set and length in bold.`;
  }

  const controls = [["data set", "dataset"], ["backbone", "backbone"], ["method", "method"], ["length", "length"]].map(([label, name]) => {
    const values = unique(leaderboardRows(true).map((row) => row[name])).filter((value) => value !== null);
    values.sort((a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b))));
    return chooser(label, [["", "all"], ...values.map((value) => [value, String(value)])], (value) => { chosen[name] = value; show(); })[0];
  });
  const box = make("input", { type: "checkbox", onchange: () => { each = box.checked; show(); } });
  parent.append(make("div", { class: "controls" }, controls, make("label", { class: "check" }, box, "a line for each run")),
    scrolling("Leaderboard", make("table", {}, make("thead", {}, make("tr", {}, heads)), body), status));
  show();
}
