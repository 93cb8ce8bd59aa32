function buildFigures(parent) {
  parent.append(make("div", { class: "grid wide" }, page.figures.map((figure) => make("figure", { class: "card" },
    make("figcaption", {}, figure.title), make("button", { type: "button", "aria-label": `${figure.title}: show in full size`,
      onclick: () => enlarge(figure) }, make("img", { src: figure.source, alt: figure.title, loading: "lazy" }))))));
}

function enlarge(figure) {
  const dialog = make("dialog", { "aria-label": figure.title, onclose: () => dialog.remove() },
    make("button", { type: "button", onclick: () => dialog.close() }, "close"), make("img", { src: figure.source, alt: figure.title }));
  document.body.append(dialog);
  dialog.showModal();
}

function buildLeftOut(parent) {
  parent.append(make("p", {}, "These lie in the folders that were read, and are in no table above."),
    listed(page.left_out.map(([path, reason]) => `${path}: ${reason}`)));
}

function build() {
  const runs = page.runs.length;
  const parts = [
    ["leaderboard", runs, buildLeaderboard], ["comparison", page.comparison.length, buildComparison],
    ["figures", page.figures.length, buildFigures], ["runs", runs, buildRuns], ["left-out", page.left_out.length, buildLeftOut],
  ];
  for (const [name, there, builder] of parts) {
    if (there) {
      builder(section(name));
      section("sections").append(make("a", { href: `#${name}` }, document.getElementById(`${name}-title`).textContent));
    } else section(name).hidden = true;
  }
  const finished = page.runs.map((run) => run.finished).filter(Boolean).sort();
  section("summary").textContent = runs
    ? `${count(runs)} ${runs === 1 ? "run" : "runs"} of ${count(unique(page.runs.map((run) => run.model)).length)} models on ` +
      `${unique(page.runs.map((run) => run.dataset)).join(", ")}; finished ${moment(finished[0])} to ${moment(finished.at(-1))}.`
    : "No finished run was found.";
}

build();
