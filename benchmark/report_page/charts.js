// Okabe and Ito's colours and some of Tol's, told apart with any colour vision; a theme's number says it, too.
const THEMES = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#882255", "#999999", "#44AA99",
  "#332288", "#DDCC77"];
const themeColour = (theme) => THEMES[theme % THEMES.length];

function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "dark-ink" : "light-ink";
}

// A tick's label: no digits that say nothing.
const tickText = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text).replace(/^[+−]0$/, "0");

function ticksOf(low, high, wanted) {
  if (low === high) return [low];
  const raw = (high - low) / wanted;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((times) => times * unit).find((size) => size >= raw * 0.999);
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) ticks.push(tick);
  return ticks;
}

// series: [{name, points: [{x, y, note, best}]}], one or two of them; phases: [{name, from, to}] of the first.
function lineChart(title, series, phases, show) {
  const width = 330, height = 210, left = 58, right = 12, top = 28, bottom = 38;
  const points = series.flatMap((one) => one.points);
  let low = Math.min(...points.map((point) => point.y)), high = Math.max(...points.map((point) => point.y));
  const level = low === high ? [low] : null;
  const margin = (high - low) * 0.08 || Math.abs(high) * 0.05 || 1;
  [low, high] = [low - margin, high + margin];
  const end = Math.max(...points.map((point) => point.x), 1);
  const x = (value) => left + (value / end) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  const told = series.map((one) => `${one.name}: ${show(one.points[0].y)} to ${show(one.points.at(-1).y)}`).join("; ");
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${told}` });
  phases.forEach((phase, number) => {
    if (number % 2) svg.append(draw("rect", { class: "band", x: x(phase.from), y: top, width: x(phase.to) - x(phase.from),
      height: height - top - bottom }));
    const room = x(phase.to) - x(phase.from);
    if (phases.length > 1 && room > 7 * phase.name.length) {
      svg.append(draw("text", { x: (x(phase.from) + x(phase.to)) / 2, y: top - 6, "text-anchor": "middle" }, phase.name));
    }
  });
  for (const tick of level || ticksOf(low, high, 4)) {
    svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
      draw("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, tickText(show(tick))));
  }
  for (const tick of ticksOf(0, end, 4)) {
    svg.append(draw("text", { x: x(tick), y: height - bottom + 16, "text-anchor": "middle" }, short(tick)));
  }
  svg.append(draw("text", { x: width - right, y: height - 4, "text-anchor": "end" }, "training steps"));
  series.forEach((one, number) => {
    const kind = number ? "second" : "first";
    const path = one.points.map((point, at) => `${at ? "L" : "M"}${x(point.x).toFixed(1)},${y(point.y).toFixed(1)}`).join("");
    svg.append(draw("path", { class: `line ${kind}`, d: path }));
    for (const point of one.points) {
      svg.append(draw("circle", { class: `dot ${kind}${point.best ? "" : " hollow"}`, cx: x(point.x), cy: y(point.y), r: 4 },
        draw("title", {}, `${one.name}: ${show(point.y)}\n${point.note}${point.best ? "\nbest so far" : ""}`)));
    }
  });
  return make("figure", { class: "card" }, make("figcaption", {}, title), svg);
}

// columns: [{name, shares: [n]}]
function stackedColumns(title, columns, caption, noun) {
  const shown = columns.length;
  const width = 330, height = 230, left = 38, top = 8, bottom = 46;
  const themes = Math.max(...columns.map((column) => column.shares.length));
  const step = (width - left) / shown, bar = Math.min(step * 0.86, 90);
  const y = (share) => height - bottom - share * (height - top - bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ` +
    `At the last evaluation: ${columns.at(-1).shares.map((share, theme) => `${noun} ${theme} ${percent(share)}`).join(", ")}` });
  for (const tick of [0, 0.5, 1]) {
    svg.append(draw("line", { class: "axis", x1: left, x2: width, y1: y(tick), y2: y(tick) }),
      draw("text", { x: left - 5, y: y(tick) + 4, "text-anchor": "end" }, `${100 * tick}%`));
  }
  const every = Math.ceil(shown / 5);
  columns.forEach((column, at) => {
    const start = left + step * at + (step - bar) / 2;
    let below = 0;
    column.shares.forEach((share, theme) => {
      const size = y(below) - y(below + share);
      svg.append(draw("rect", { class: "cell", x: start, y: y(below + share), width: bar, height: size, fill: themeColour(theme) },
        draw("title", {}, `${column.name}: ${noun} ${theme}, ${percent(share)}`)));
      if (size > 13 && bar > 14) {
        svg.append(draw("text", { x: start + bar / 2, y: y(below + share / 2) + 4, "text-anchor": "middle",
          class: inkOn(themeColour(theme)) }, String(theme)));
      }
      below += share;
    });
    if (at % every === 0) {
      column.name.split("\n").forEach((line, row) => svg.append(
        draw("text", { x: start + bar / 2, y: height - bottom + 16 + 15 * row, "text-anchor": "middle" }, line)));
    }
  });
  return make("figure", { class: "card" }, make("figcaption", {}, title), svg, themeKey(themes, noun),
    make("p", { class: "quiet" }, caption));
}

function themeKey(themes, noun) {
  return make("ul", { class: "key" }, Array.from({ length: themes }, (_, theme) =>
    make("li", {}, swatch(theme), `${noun} ${theme}`)));
}

function swatch(theme) {
  return draw("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" },
    draw("rect", { width: 14, height: 14, rx: 2, fill: themeColour(theme) }));
}

// rows: [{name, mean, low, high, note}]; differences, 0 in the middle of attention.
function intervals(title, rows, metric) {
  const width = 400, line = 26, right = 24, top = 8, height = top + line * rows.length + 40;
  const left = 20 + 7.2 * Math.max(...rows.map((row) => row.name.length));
  const ends = rows.flatMap((row) => [row.mean, row.low ?? row.mean, row.high ?? row.mean]);
  let low = Math.min(0, ...ends), high = Math.max(0, ...ends);
  const margin = (high - low || 1e-3) * 0.08;
  [low, high] = [low - margin, high + margin];
  const x = (value) => left + ((value - low) / (high - low)) * (width - left - right);
  const told = rows.map((row) => `${row.name} ${score(row.mean, metric, true)}`).join(", ");
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${told}` });
  for (const tick of ticksOf(low, high, 3)) {
    svg.append(draw("line", { class: "axis", x1: x(tick), x2: x(tick), y1: top, y2: height - 32 }),
      draw("text", { x: x(tick), y: height - 16, "text-anchor": "middle" }, tickText(score(tick, metric, true))));
  }
  svg.append(draw("line", { class: "zero", x1: x(0), x2: x(0), y1: top, y2: height - 32 }),
    draw("text", { x: width - right, y: height - 2, "text-anchor": "end" }, isLoss(metric) ? "less is better" : "points; more is better"));
  rows.forEach((row, at) => {
    const middle = top + line * (at + 0.5);
    svg.append(draw("text", { class: "strong", x: left - 10, y: middle + 4, "text-anchor": "end" }, row.name));
    if (isNumber(row.low)) {
      svg.append(draw("line", { class: "line first", x1: x(row.low), x2: x(row.high), y1: middle, y2: middle }));
    }
    svg.append(draw("circle", { class: `dot first${isNumber(row.low) ? "" : " hollow"}`, cx: x(row.mean), cy: middle, r: 5 },
      draw("title", {}, `${row.name}: ${score(row.mean, metric, true)}${row.note ? "\n" + row.note : ""}`)));
  });
  return make("figure", { class: "card" }, make("figcaption", {}, title), svg);
}
