function buildRuns(parent) {
  const name = (run) => `${run.expid} · ${run.dataset} · length ${run.max_len ?? "?"} · seed ${run.seed} · ${moment(run.finished)}`;
  const options = page.runs.map((run, at) => [at, name(run)]);
  const [label, select] = chooser("run", options, () => { location.hash = `run-${select.value}`; });
  const [besideLabel, beside] = chooser("beside it", [["", "no other"], ...options], () => show());
  const body = make("div", { "aria-live": "off" });

  function show() {
    const run = page.runs[Number(select.value)];
    const other = beside.value === "" || beside.value === select.value ? null : page.runs[Number(beside.value)];
    body.replaceChildren(make("h3", { tabindex: -1, id: "shown-run" }, name(run)), facts(run), scoreTable(run), ...curves(run, other),
      ...buildRouters(run), make("details", {}, make("summary", {}, "Configuration"),
        make("pre", { tabindex: 0 }, JSON.stringify(run.config, null, 2))));
  }

  function follow() {
    const found = /^#run-(\d+)$/.exec(location.hash);
    if (!found || !page.runs[Number(found[1])]) return;
    select.value = String(Number(found[1]));
    show();
    const title = document.getElementById("shown-run");
    title.scrollIntoView();
    title.focus({ preventScroll: true });
  }

  parent.append(make("div", { class: "controls" }, label, page.runs.length > 1 ? besideLabel : null), body);
  const routed = page.runs.findIndex((run) => run.view);
  select.value = String(Math.max(routed, 0));
  show();
  addEventListener("hashchange", follow);
  follow();
}

function facts(run) {
  const shown = [
    ["model", run.model], ["seed", run.seed], ["data set", run.dataset], ["history length", run.max_len ?? "not recorded"],
    ["monitored", run.monitor ? `${run.monitor}: ${short(run.monitored)} on validation` : "not recorded"],
    ["parameters", count(run.parameters)], ["FLOPs a row, prediction", isNumber(run.flops) ? short(run.flops) : "not recorded"],
    ["time", duration(run.seconds)], ["peak memory", isNumber(run.peak_mib) ? `${count(run.peak_mib)} MiB` : "not recorded"],
    ["finished", moment(run.finished)], ["commit", commitName(run.git_commit)],
    ["folder", run.path],
  ];
  return make("dl", { class: "facts" }, shown.map(([term, told]) => make("div", {}, make("dt", {}, term), make("dd", {}, String(told)))));
}

function commitName(commit) {
  return commit ? commit.slice(0, 12) + (commit.endsWith("+changes") ? ", with changes" : "") : "not recorded";
}

function scoreTable(run) {
  const splits = unique(["valid", "test", ...Object.keys(run.scores)]).filter((split) => run.scores[split]);
  const metrics = unique(splits.flatMap((split) => Object.keys(run.scores[split])));
  const lines = [["final model", run.scores]];
  if (run.phase1) lines.push(["after phase 1, the backbone alone", run.phase1]);
  for (const name of unique(splits.flatMap((split) => Object.keys((run.baselines || {})[split] || {})))) {
    lines.push([name, Object.fromEntries(splits.map((split) => [split, (run.baselines[split] || {})[name] || {}]))]);
  }
  return scrolling("Scores of the run", make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col", class: "text" }, "of"),
      splits.flatMap((split) => metrics.map((metric) => make("th", { scope: "col" }, `${split} ${metric}`))))),
    make("tbody", {}, lines.map(([title, of]) => make("tr", {}, make("th", { scope: "row", class: "text" }, title),
      splits.flatMap((split) => metrics.map((metric) => {
        const value = (of[split] || {})[metric];
        return make("td", { title: isNumber(value) ? value.toFixed(6) : null }, score(value, metric));
      })))))), "Scores in percent but for losses");
}

function curves(run, other) {
  const title = make("h3", {}, "Curves");
  if (!run.history.length) return [title, make("p", {}, "The record has no evaluations.")];
  const shown = [run, ...(other ? [other] : [])];
  const phases = [];
  for (const entry of run.history) {
    if (phases.length && phases.at(-1).name === entry.phase) phases.at(-1).to = entry.step;
    else phases.push({ name: entry.phase, from: phases.length ? phases.at(-1).to : 0, to: entry.step });
  }
  const chart = (heading, read, show) => {
    const series = shown.map((one, at) => ({
      name: at ? `${one.expid}, seed ${one.seed} (dashed)` : `${one.expid}, seed ${one.seed}`,
      points: one.history.filter((entry) => isNumber(read(entry))).map((entry) => (
        { x: entry.step, y: read(entry), best: entry.best, note: `${entry.phase}, epoch ${entry.epoch ?? "?"}, step ${count(entry.step)}` })),
    })).filter((one) => one.points.length);
    return series.length ? lineChart(heading, series, phases, show) : null;
  };
  const metrics = unique(run.history.flatMap((entry) => Object.keys(entry.valid)));
  const charts = [
    chart("Training loss", (entry) => entry.loss, short),
    ...metrics.map((metric) => chart(`Validation ${metric}`, (entry) => entry.valid[metric], (value) => score(value, metric))),
    chart("Learning rate", (entry) => entry.rate, short), chart("Gradient norm, mean before clipping", (entry) => entry.norm, short),
  ].filter(Boolean);
  const warnings = unique(run.history.flatMap((entry) => entry.warnings));
  return [title, make("p", { class: "quiet" }, "One point an evaluation; filled where the monitored figure was the best of its phase so far" +
    (other ? `; dashed: ${other.expid}, seed ${other.seed}.` : ".")),
  charts.length ? make("div", { class: "grid" }, charts) : make("p", {}, "The record's evaluations hold no figures."),
  make("details", {}, make("summary", {}, "The same as a table"), evaluations(run, metrics)),
  warnings.length ? make("h3", {}, "Warnings while training") : null, warnings.length ? listed(warnings) : null].filter(Boolean);
}

function evaluations(run, metrics) {
  const titles = ["phase", "epoch", "steps", "train loss", ...metrics.map((metric) => `valid ${metric}`), "learning rate", "best so far"];
  return scrolling("Evaluations of the run", make("table", {}, make("thead", {}, make("tr", {}, titles.map((text, at) =>
    make("th", { scope: "col", class: at ? null : "text" }, text)))),
  make("tbody", {}, run.history.map((entry) => make("tr", {}, make("th", { scope: "row", class: "text" }, entry.phase),
    [String(entry.epoch ?? "–"), count(entry.step), short(entry.loss), ...metrics.map((metric) => score(entry.valid[metric], metric)),
      short(entry.rate), entry.best ? "yes" : ""].map((text) => make("td", {}, text)))))));
}
