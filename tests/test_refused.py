"""What the runner refuses before anything runs, and what it publishes, in a copy of the tree where nothing has run."""

import contextlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from weightsum_lib import normalize, run, vgg8
from weightsum_lib.report.page import readme_headline
from weightsum_lib.study import measure, params, plan, runs, store

ROOT = Path(__file__).parent.parent


def test_wrong_parameters_stop_before_anything_runs(tree):
    with tree.edited("params/smoke.yaml", "epochs: 2", "epocs: 2"):
        failed = tree.run("all", "--profile", "smoke")
    assert failed.returncode == 2 and failed.stdout == ""
    assert "params/smoke.yaml: unknown parameter 'epocs'; did you mean 'epochs'?" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all", "--profile", "full"], "no GPU here"),
        (["all", "--profile", "published"], "make book PROFILE=published"),
        (["all", "--profile", "literal"], "is some pages, no report: make notebooks PROFILE=literal"),
        (["notebooks", "--profile", "literal", "--notebook", "02"], "begins with '02'; there are 01_mnist_cifar10"),
        (
            ["all", "--profile", "smoke", "--seeds", "two"],
            "'seeds' (seeds 0, 1, … of each method) must be int from 1 to 1000, got 'two' (str)",
        ),
        (["all", "--profile", "smoke", "--notebook", "09"], "no notebook begins with '09'; there are 00_how_to_sum, "),
        (["book", "--profile", "quick"], "make all PROFILE=quick"),
        (["book", "--profile", "nope"], "no parameter file params/nope.yaml"),
    ],
)
def test_what_cannot_be_run_stops_at_once_and_says_what_to_do(tree, arguments, message):
    failed = tree.run(*arguments)
    assert failed.returncode == 2 and message in failed.stderr and failed.stdout == ""


def test_what_stops_the_training_of_all_pages_is_said_and_each_page_goes_on(monkeypatch, capfd, tmp_path):
    def fails(study, configs):
        made.append(f"training of {len(configs)}")
        raise FloatingPointError("the loss is not finite")

    made, p = [], params.read("smoke", {"device": "cpu"})
    monkeypatch.setenv("JUPYTER_PATH", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(runs.Study, "notebooks_at_once", lambda study: 2)
    monkeypatch.setattr(runs.Study, "train_all", fails)
    monkeypatch.setattr(run, "check", lambda p: None)
    monkeypatch.setattr(run, "execute", lambda name, *_: made.append(name) or name[1] != "3")
    monkeypatch.setattr(run.pool, "opened", lambda at_once, fresh: contextlib.nullcontext(run.pool.Pool()))
    assert not run.run_notebooks(p, tmp_path)
    first = f"training of {len(plan.queue(runs.Study(p)))}"  # of all that the pages need, before any page
    assert made == [first, *run.notebook_names(p)]  # one failed, which stopped none
    assert "  training: stopped by FloatingPointError: the loss is not finite\n" in capfd.readouterr().err


def test_a_dataset_that_is_neither_there_nor_allowed_stops_at_once(tree):
    with tree.edited("params/smoke.yaml", "allow_standin: [mnist, cifar10, svhn]", "allow_standin: [mnist, cifar10]"):
        failed = tree.run("all", "--profile", "smoke")
    assert failed.returncode == 2 and "no SVHN" in failed.stderr and "allow_standin: [svhn]" in failed.stderr


@pytest.mark.parametrize(
    ("profile", "notebook"),
    [("literal", "01_mnist_cifar10"), ("day", "04_what_transfers"), ("deep", "05_beside_others")],
)
def test_a_page_is_published_alone_and_shown_from_where_it_was_made(tmp_path, monkeypatch, profile, notebook):
    kept = shutil.copytree(ROOT / "book" / "published", tmp_path / "published")
    before = {path.name: path.read_bytes() for path in kept.iterdir() if path.is_file()}
    shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "PUBLISHED", kept)
    monkeypatch.setattr(run, "_is_fresh", lambda *_: True)
    folder = tmp_path / "results" / profile
    name = f"{profile}_{notebook[:2]}"
    page = [f"{name}.json", f"{name}.ipynb"]
    assert all(run.standing(folder)[made] == kept / made for made in page)
    content = store.read_json(kept / f"{notebook}.json")
    content["provenance"]["commit"], content["provenance"]["params"]["arch"] = "abc123", "vgg99"
    store.write_json(folder / f"{notebook}.ipynb", {"cells": []})
    assert run.standing(folder)[f"{name}.ipynb"] == kept / f"{name}.ipynb"  # without results it failed
    store.write_json(folder / f"{notebook}.json", content)
    assert all(run.standing(folder)[made].parent == folder for made in page)
    run.publish(params.read(profile, {"results_dir": str(folder.parent)}), folder)
    after = {path.name: path.read_bytes() for path in kept.iterdir() if path.is_file()}
    assert {name for name in after if after[name] != before.get(name)} <= {*page, "headline.json", "headline.png"}
    assert after[f"{name}.json"] == (folder / f"{notebook}.json").read_bytes()
    assert readme_headline(kept) in (tmp_path / "README.md").read_text(encoding="utf-8")
    values = store.read_json(kept / "headline.json")["values"]
    assert "VGG99" in values.pop(f"{name}_notice") and not any("VGG99" in str(value) for value in values.values())


def test_results_are_of_the_claims_and_the_code_that_they_were_made_with(tiny, tmp_path, monkeypatch, capsys):
    name = "01_mnist_cifar10"
    stamp = run._stamp(name, tiny)
    with monkeypatch.context() as patch:
        patch.setattr(params, "CLAIMS", ROOT / "params" / "recipes.yaml")
        assert run._stamp(name, tiny) != stamp
    monkeypatch.setattr(run, "_run", lambda name, p, target: store.write_json(target, {}) or "")
    for edited in (True, False):
        monkeypatch.setattr(store, "edited", lambda edited=edited: edited)
        assert run.execute(name, tiny, tmp_path) and run._is_fresh(name, tiny, tmp_path) != edited
        assert ("was edited meanwhile; it will run again" in capsys.readouterr().err) == edited


def test_networks_are_kept_with_a_card_that_says_what_they_read(tiny, tmp_path):
    study = runs.Study(tiny)
    files = measure.take_home(study, tmp_path)
    for name in ("mnist", "svhn"):
        path = files[f"networks/{name}.safetensors"]
        with safe_open(path, "pt") as file:
            card = json.loads(file.metadata()["about"])
        network = vgg8(width=card["width"], centered_scale=True).eval()
        network.load_state_dict(load_file(path))
        images, labels = (getattr(study.dataset(name), f"test_{kind}") for kind in ("images", "labels"))
        right = 100 * (network(normalize(images)).argmax(1) == labels).float().mean().item()
        assert {*card["test accuracy (%)"]} == {"alone", "state dicts added"} and "1/128" in card["key"]
        assert card["test accuracy (%)"]["alone"] == pytest.approx(right)


def test_make_without_a_target_prints_the_targets():
    if not shutil.which("make"):
        pytest.skip("no make on this machine")
    said = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    for word in ("all", "test", "lab", "book", "PROFILE", "DATA_DIR", "SEEDS", "DEVICE"):
        assert re.search(rf"\b{word}\b", said), word
