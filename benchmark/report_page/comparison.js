// The same figures as benchmark/compare.py writes: each model's configuration that validation chose.
const OPEN_PLACES = 4;
// With fewer seeds an interval that leaves out 0 is no reason to paint a difference.
const SEEDS_TO_PAINT = 6;

function buildComparison(parent) {
  parent.append(make("p", {}, "Of a model's configurations the one with the most seeds stands here, of these the one that is best on " +
    "validation; “tried” says of how many. “vs plain” is the mean difference to the plain backbone over the seeds that both ran, with " +
    `a ${Math.round(100 * page.level)} % bootstrap interval; with one seed there is none.`));
  const places = [...groupBy(page.comparison, (line) => JSON.stringify([line.dataset, line.max_len, line.head])).values()];
  places.forEach((lines, at) => {
    const place = make("details", { open: !at || places.length <= OPEN_PLACES }, make("summary", {}, make("h3", {}, placeName(lines[0]))));
    buildPlace(place, lines);
    parent.append(place);
  });
  if (page.ranks.length) buildRanks(parent);
  if (page.notes.length) parent.append(make("h3", {}, "To be known"), listed(page.notes));
  if (page.footnotes.length) {
    parent.append(make("details", {}, make("summary", {}, "About the figures of the paper and of LongCTR"), listed(page.footnotes)));
  }
}

const placeName = (line) => `${line.dataset}, length ${line.max_len ?? "not recorded"}, head ${line.head}`;

function buildPlace(parent, lines) {
  const title = placeName(lines[0]);
  const theirs = ["paper", "longctr"].filter((name) => lines.some((line) => line[name] !== null && line[name] !== ""));
  const metrics = unique(lines.map((line) => line.metric));
  const models = [...groupBy(lines, (line) => line.model)];
  const head = [make("th", { scope: "col", class: "text" }, "model"), make("th", { scope: "col" }, "seeds"), make("th", { scope: "col" }, "tried")];
  for (const metric of metrics) {
    head.push(make("th", { scope: "col" }, metric), make("th", { scope: "col" }, `${metric} vs plain`), make("th", { scope: "col" }, "rank"));
    for (const name of theirs) head.push(make("th", { scope: "col" }, `${metric}, ${name === "paper" ? "paper" : "LongCTR"}`));
  }
  const rows = models.map(([model, own]) => {
    const cells = [make("th", { scope: "row", class: "text" }, model), make("td", {}, String(own[0].seeds)), make("td", {}, String(own[0].tried))];
    for (const metric of metrics) {
      const line = own.find((one) => one.metric === metric);
      cells.push(make("td", {}, line ? [score(line.mean, metric), line.sd === null ? null
        : make("span", { class: "sd" }, ` ± ${score(line.sd, metric)}`)] : "–"));
      cells.push(make("td", { title: line ? line.trust || null : null }, line ? difference(line, lines) : "–"));
      cells.push(make("td", {}, line && isNumber(line.rank) ? short(line.rank) : "–"));
      for (const name of theirs) {
        cells.push(make("td", {}, !line ? "–" : name === "paper" ? line.paper || "–" : score(line.longctr, metric)));
      }
    }
    return make("tr", {}, cells);
  });
  parent.append(scrolling(`Comparison, ${title}`, make("table", {},
    make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows)),
  `Scores on ${page.split}, in percent but for losses; differences in points. Rank among the models of one backbone. ` +
    `Coloured where an interval of ${SEEDS_TO_PAINT} seeds or more leaves out 0.`));
  const trust = unique(lines.map((line) => line.trust).filter(Boolean));
  if (trust.length) parent.append(make("p", { class: "quiet" }, `Intervals: ${trust.join("; ")}.`));
  const charts = metrics.map((metric) => {
    const compared = lines.filter((line) => line.metric === metric && line.difference !== null);
    return compared.length ? intervals(`${metric} against the plain backbone`, compared.map((line) => (
      { name: line.model, mean: line.difference, low: line.low, high: line.high, note: line.trust })), metric) : null;
  });
  if (charts.some(Boolean)) parent.append(make("div", { class: "grid" }, charts));
}

function difference(line, lines) {
  if (line.difference === null) {
    if (!line.method) return "";
    return lines.some((one) => one.backbone === line.backbone && !one.method) ? "no common seed" : "no plain run";
  }
  const gain = isLoss(line.metric) ? -line.difference : line.difference;
  const sure = line.pairs >= SEEDS_TO_PAINT && isNumber(line.low) && line.low * line.high > 0;
  const text = make("span", { class: sure ? (gain > 0 ? "good" : "bad") : null }, score(line.difference, line.metric, true));
  const interval = isNumber(line.low)
    ? ` [${score(line.low, line.metric, true)}, ${score(line.high, line.metric, true)}]` : " (1 seed, no interval)";
  const chance = isNumber(line.wilcoxon_p) ? ` p ${line.wilcoxon_p.toFixed(3)}` : "";
  return [text, make("span", { class: "sd" }, interval + chance)];
}

function buildRanks(parent) {
  const lines = page.ranks.flatMap((ranked) => ranked.models.map((model) => ({ ranked, model })))
    .filter(({ ranked }) => ranked.datasets.length);
  parent.append(make("h3", {}, "Mean ranks"), make("p", { class: "quiet" }, "Each backbone's models are ranked on each data set by their " +
    "means, 1 is best; then ranks are averaged over the data sets that all of them ran on."));
  if (lines.length) {
    const titles = ["backbone", "model", "length", "head", "data sets"];
    parent.append(scrolling("Mean ranks", make("table", {}, make("thead", {}, make("tr", {},
      titles.map((title, at) => make("th", { scope: "col", class: at < 2 ? "text" : null }, title)),
      page.metrics.map((metric) => make("th", { scope: "col" }, metric)))),
    make("tbody", {}, lines.map(({ ranked, model }) => make("tr", {},
      make("td", { class: "text" }, ranked.backbone), make("th", { scope: "row", class: "text" }, model),
      [count(ranked.max_len), ranked.head, String(ranked.datasets.length)].map((text) => make("td", {}, text)),
      page.metrics.map((metric) => make("td", {}, ranked.ranks[metric][model].toFixed(2)))))))));
  }
  const without = page.ranks.filter((ranked) => ranked.left_out.length);
  if (without.length) {
    parent.append(listed(without.map((ranked) => `${ranked.backbone}, length ${ranked.max_len ?? "not recorded"}: not all of its models ` +
      `ran on ${ranked.left_out.join(", ")}; left out of the ranks.`)));
  }
}
