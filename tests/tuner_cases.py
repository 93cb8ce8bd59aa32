"""A repository whose ``run_expid.py`` is a stand-in that trains nothing and ends as a test wants it to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Answer

import model_zoo.experiment.tuner as tuner_module
from model_zoo.experiment.tuner_cli import main

Tune = Callable[..., Answer]

#: the stand-in reads its config and writes its record where and as ``run_expid.py`` does; how its n-th run of a value of
#: ``topk`` ends is in plan.json, and each run is a line of calls.txt
STAND_IN = '''
import argparse, json, os, signal, sys, time
import yaml

options = argparse.ArgumentParser()
for name in ("--config", "--expid", "--seed", "--gpu", "--resume", "--load"):
    options.add_argument(name)
options = options.parse_args()
here = os.path.dirname(os.path.abspath(__file__))
if options.resume:
    folder = options.resume
    with open(os.path.join(folder, "config.yaml")) as file:
        (expid, params), = yaml.safe_load(file).items()
else:
    expid = options.expid
    with open(os.path.join(options.config, "model_config", expid + ".yaml")) as file:
        params = yaml.safe_load(file)[expid]
    params.update(seed=int(options.seed), model_id=expid)
    stem = os.path.join(params["model_root"], params["dataset_id"], expid, time.strftime("%Y%m%d-%H%M%S"))
    folder, number = f"{stem}-seed{options.seed}", 1
    while os.path.exists(folder):
        number += 1
        folder = f"{stem}-seed{options.seed}-{number}"
    os.makedirs(folder)
    with open(os.path.join(folder, "config.yaml"), "w") as file:
        yaml.safe_dump({expid: params}, file)
who = [params["topk"], params["seed"]]
calls = os.path.join(here, "calls.txt")
with open(calls) as file:
    earlier = sum(json.loads(line)["who"] == who for line in file)
with open(calls, "a") as file:
    call = {"who": who, "resumed": bool(options.resume), "gpu": int(options.gpu), "data": params["dataset_id"],
            "threads": os.environ.get("OMP_NUM_THREADS"), "params": params, "began": time.time()}
    file.write(json.dumps(call) + "\\n")
with open(os.path.join(here, "plan.json")) as file:
    plan = json.load(file).get(str(params["topk"]), ["done"])
end = plan[min(earlier, len(plan) - 1)]
print("training", flush=True)
if end == "crash":
    raise RuntimeError("no memory for topk " + str(params["topk"]))
if end == "refuse":
    print("error: the data are not sound", flush=True)
    sys.exit(2)
if end == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if end == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if end in ("wait", "deaf"):
    with open(os.path.join(here, "waiting"), "w"):
        pass
    time.sleep(60)
if end == "sleep":
    time.sleep(0.4)
auc = 0.5 + params["topk"] / 100 + params["seed"] / 10000
scores = {"valid": {"AUC": auc, "gAUC": auc}, "test": {"AUC": auc, "gAUC": auc}} if end != "none" else {}
record = {"expid": expid, "dataset_id": params["dataset_id"], "model": params["model"], "seed": params["seed"],
          "config": params, "scores": {"final": scores}, "finished": os.path.basename(folder)[:15],
          "command": "run_expid.py", "seconds": {"total": 2.0}}
with open(os.path.join(folder, "metrics.json"), "w") as file:
    json.dump(record, file)
print("done", flush=True)
'''


@dataclass
class Workshop:
    """A repository with the stand-in.

    Attributes:
        root: it.
        base: the config directory of ``TWIN_tiny`` and others.
    """

    root: Path
    base: Path

    @classmethod
    def made(cls, root: Path, base: Path) -> Workshop:
        """One in an empty folder."""
        (root / "run_expid.py").write_text(STAND_IN)
        (root / "calls.txt").write_text("")
        workshop = cls(root, base)
        workshop.plan({})
        return workshop

    def plan(self, ends: Mapping[int, Iterable[str]]) -> None:
        """How the runs of each value of ``topk`` end, one after the other; the last way goes on."""
        (self.root / "plan.json").write_text(json.dumps({str(key): list(ways) for key, ways in ends.items()}))

    def grid(self, space: Mapping[str, Any], name: str = "g", **more: Any) -> Path:
        """A tuner file over ``TWIN_tiny``."""
        path = self.root / f"{name}.yaml"
        content = {"base_config": str(self.base), "base_expid": "TWIN_tiny", **more, "tuner_space": dict(space)}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    @property
    def runs(self) -> Path:
        """Where the results go."""
        return self.root / "runs"

    def space(self, **values: Any) -> dict[str, Any]:
        """A space whose results are here."""
        return {"model_root": str(self.runs), **values}

    def calls(self) -> list[dict[str, Any]]:
        """What the stand-in was called with, in order."""
        return [json.loads(line) for line in (self.root / "calls.txt").read_text().splitlines()]

    def who(self) -> list[tuple[int, int]]:
        """``topk`` and seed of each call."""
        return [(call["who"][0], call["who"][1]) for call in self.calls()]

    def records(self) -> list[Path]:
        """All records."""
        return sorted(self.runs.glob("*/*/*/metrics.json"))

    def table(self, name: str = "g") -> list[str]:
        """Lines of the results csv."""
        return (self.runs / f"{name}.csv").read_text().splitlines()


@pytest.fixture(name="shop")
def shop_fixture(tmp_path: Path, tiny_config: Path) -> Workshop:
    """An empty one."""
    return Workshop.made(tmp_path, tiny_config)


@pytest.fixture(name="tune")
def tune_fixture(shop: Workshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tune:
    """``tune(file, *options)``: ``run_param_tuner.py`` in this process."""
    monkeypatch.setattr(tuner_module, "POLL", 0.05)

    def run(path: Path, *arguments: object) -> Answer:
        capsys.readouterr()
        try:
            code = main(str(shop.root), ["--config", str(path), *map(str, arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
        written = capsys.readouterr()
        return Answer(code, written.out, written.err)

    return run
