"""The plan of a report holds the runs that its notebooks ask for, and no others."""

import base64
import random
import types

import jupytext
import numpy as np
import pytest
from conftest import tiny_params

from weightsum_lib.report import plots, tables
from weightsum_lib.run import NOTEBOOKS, notebook_names
from weightsum_lib.study import plan
from weightsum_lib.study.config import build
from weightsum_lib.study.runs import Run, Study

pytestmark = pytest.mark.no_cover  # what it covers others do, and being watched takes as long as the tests


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"seeds": 2, "choice_seeds": 1, "ceiling_seeds": 1},
        {"pages": ["02"]},
        {"pages": ["03"]},
        {"pages": ["04"]},
        {"pages": ["05"]},
    ],
)
def test_the_queue_is_what_the_notebooks_ask_for(monkeypatch, tmp_path, knobs):
    asked, draws = set(), random.Random(0)

    def train_all(study, configs):
        asked.update(study.with_parents(configs))

    def run(study, config):
        study.train_all([config])
        losses = dict.fromkeys(("val_sum", "val_main", "val_support", "seconds", "loss_third"), 1.0)
        return Run(config, {r: build(config, r).eval() for r in config.roles}, [{"epoch": 1, **losses}])

    def found(call):
        what = call.args[1]
        if call.func.__name__ == "accuracies":
            right = base64.b64encode(np.packbits([1] * 40)).decode()
            return {
                name: {"accuracy": draws.uniform(50, 99), "confidence": 50.0, "images": 40, "right": right}
                for name in call.keywords["tested"]
            }
        if call.func.__name__ == "_plane":
            return {"coefficients": [0.0, 1.0], **{name: [[1.0, 1.0]] * 2 for name in what.tasks}}
        return 1.0 if call.func.__name__ == "_weights" else [{"layer": "fc2", "explained": 0.5}]

    def measured(study, wanted):
        study.train_all([config for m in wanted for config in m.configs])
        return [found(m.function) for m in wanted]

    for name, function in (("train_all", train_all), ("run", run), ("measured", measured)):
        monkeypatch.setattr(Study, name, function)
    for name, drawn in vars(plots).items():
        if isinstance(drawn, types.FunctionType) and not name.startswith("_"):
            monkeypatch.setattr(plots, name, lambda *_, **__: None)
    monkeypatch.setattr(tables, "save", lambda *_, **__: None)
    p = tiny_params(tmp_path, **knobs)
    for name in [name for name in notebook_names(p) if not name.startswith("00")]:
        scope = {"tiny": p}
        for cell in jupytext.read(NOTEBOOKS / f"{name}.py").cells:
            if cell.cell_type == "code":
                exec(cell.source.replace("params.from_notebook(globals())", "tiny"), scope)
    study = Study(p)
    queue = plan.queue(study)
    assert len(queue) == len(set(queue)) and set(study.with_parents(queue)) == asked
    assert {config.seed for config in queue} >= ({0, 1, 100} if "seeds" in knobs else {0})
    assert p.pages != ["02"] or {config.main for config in queue} == {"svhn", "cifar10"}
    assert p.pages != ["05"] or {config.main[:-4] for config in queue} == {f"{name} classes" for name in p.halves}
