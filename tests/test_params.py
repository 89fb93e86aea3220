import json
import math
import re
import shutil
import time
from dataclasses import fields, replace

import jupytext
import pytest
from papermill.iorw import load_notebook_node, read_yaml_file
from papermill.parameterize import parameterize_notebook

from weightsum_lib.run import NOTEBOOKS, notebook_names
from weightsum_lib.study import params
from weightsum_lib.study.params import DISJOINT, RANDOM, SHARED, TRAINED, Method, ParamsError

PROFILES = ["smoke", "quick", "evening", "literal", "residual", "deep", "day", "full"]
KEYED = {"protocol": "joint", "third": "ce", "network_width": 0.25}
ROWS = {"independent": None, "joint ce": None, "random keys": None, "disjoint keys": None, "keys alone": None}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a profile `mine`: that for tests, with lines of its file replaced."""
    shutil.copy(params.PARAMS_DIR / "recipes.yaml", tmp_path)
    text = (params.PARAMS_DIR / "smoke.yaml").read_text(encoding="utf-8").replace("profile: smoke", "profile: mine")
    monkeypatch.setattr(params, "PARAMS_DIR", tmp_path)

    def write(*lines, instead_of=None):
        kept = [line for line in text.splitlines() if not instead_of or not line.startswith(f"{instead_of}:")]
        (tmp_path / "mine.yaml").write_text("\n".join([*kept, *lines]) + "\n", encoding="utf-8")

    write()
    return write


def parameters_cell(name):
    """The parameters cell of a notebook, or None."""
    cells = jupytext.read(NOTEBOOKS / f"{name}.py").cells
    return next((cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), None)


def by_papermill(profile):
    """The cells that a kernel has run before `from_notebook` when papermill takes a profile's file."""
    notebook = jupytext.read(NOTEBOOKS / "01_mnist_cifar10.py")
    values = read_yaml_file(str(params.PARAMS_DIR / f"{profile}.yaml"))
    return history(parameterize_notebook(load_notebook_node(notebook), values))


def history(notebook):
    """What IPython knows when the third code cell runs, which calls `from_notebook`."""
    return {"In": ["", *[cell.source for cell in notebook.cells if cell.cell_type == "code"][:3]]}


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_is_whole_and_comes_back_from_its_json(profile):
    p = params.read(profile)
    assert p.profile == profile
    assert params.check(json.loads(json.dumps(p.as_dict())), "a copy") == p
    for label, share in (("¼", 1 / 4), ("⅛", 1 / 8), ("1/16", 1 / 16)):
        if (m := p.methods.get(f"random keys, trained at {label}")) is not None:
            assert m == replace(p.method(RANDOM), sum_width=0.25 / share, seeds=m.seeds)
    assert all(not set(p.choice_seeds_of(m)) & set(p.seeds_of(m)) for m in p.methods if p.choice_seeds)
    assert all(p.choice_seeds_of(m) == p.seeds_of(m) for m in p.methods if not p.choice_seeds)


def test_every_claim_has_a_value_and_one_target():
    claims = params.claims()
    assert len(claims) > 10
    for claim in claims.values():
        assert re.fullmatch(r"0\d_\w+:\w+\.\w+(\.1/\d+)?", claim["value"]), claim
        assert len(claim.keys() & {"at_least", "at_most"}) == 1 and len(claim) == 2


def test_the_profiles_are_what_they_promise():
    full = params.read("full")
    assert (full.arch, full.width, full.allow_standin, full.device) == ("vgg16", 1.0, [], "cuda")
    assert params.read("quick").allow_standin == list(params.DATASETS)
    assert params.read("smoke").data_dir == ""


def test_the_recipes_are_what_the_report_calls_them_and_each_is_another():
    recipes = {label: Method(**switches) for label, switches in made_recipes().items()}
    assert len(set(recipes.values())) == len(recipes)
    assert recipes["independent"] == Method() and recipes[SHARED] == Method(start="shared")
    assert recipes[TRAINED] == Method("joint", "ce")
    assert recipes[RANDOM].keys == "random" and recipes[DISJOINT].keys == "disjoint"
    assert recipes["joint logit_difference"].third == "logit_difference"
    used = {label for profile in PROFILES for label in params.read(profile).methods}
    assert used == set(recipes)


def made_recipes():
    rows = {label: None for label in params._read("recipes")}
    p = params.check(params.read("smoke").as_dict() | {"rows": rows, "parts": {}}, "all recipes")
    return p.as_dict()["rows"]


def test_a_row_is_a_recipe_or_a_number_of_seeds_or_switches_on_top_or_its_own():
    rows = {
        **ROWS,
        "joint distill": 2,
        "random keys, trained at ⅛": {"quiet": 0},
        "x": {"protocol": "joint", "seeds": 3},
    }
    p = params.read("smoke", {"rows": rows, "parts": {}, "seeds": 5})
    assert p.method("joint distill") == Method("joint", "distill", seeds=2)
    assert p.method("random keys, trained at ⅛") == replace(
        params.read("smoke").method("random keys, trained at ⅛"), quiet=0.0
    )
    assert p.method("x") == Method("joint", seeds=3)
    assert [len(p.seeds_of(m)) for m in ("joint distill", "x", "random keys, trained at ⅛")] == [2, 3, 5]
    assert p.methods.items() >= p.rows.items() and list(p.rows) == list(rows)


def test_a_training_run_depends_on_what_its_protocol_uses():
    changed = {
        "symmetric": True, "quiet": 1.0, "keys": "random", "network_width": 0.25, "sum_width": 2.0, "start": "shared",
        "label_smoothing": 0.1, "centered_scale": True, "permuted_support": 0.5, "seeds": 3,
    }  # fmt: skip
    alone = Method("independent", label_smoothing=0.1, centered_scale=True, start="shared", network_width=0.25)
    assert Method("independent", **changed).trained() == alone
    assert Method("sequential", **changed).trained() == Method("sequential")
    assert Method("joint", **changed).trained() == Method("joint", **changed | {"seeds": 1000})


def test_a_row_is_held_against_networks_of_its_own_size():
    p = params.read("full")
    assert p.twin("joint distill") == p.twin("shared start") == "independent"
    assert p.twin("random keys, trained at 1/16") == "keys alone"
    wide = "random keys, networks twice as wide"
    assert p.twin(wide) == "keys alone, networks twice as wide"
    assert p.method(p.twin(wide)).network_width == p.method(wide).network_width == 0.5
    values = p.as_dict()
    del values["parts"][p.twin(wide)]
    with pytest.raises(ParamsError, match=rf"{wide}.*'network_width' 0.5 is trained alone"):
        params.check(values, "full")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epocs": 3}, r"params/smoke.yaml: unknown parameter 'epocs'; did you mean 'epochs'\?"),
        ({3: 3}, r"unknown parameter '3'; known: profile, arch"),
        ({"epochs": "3x"}, r"params/smoke.yaml: 'epochs' .* must be int from 1 to 10000, got '3x' \(str\)"),
        ({"epochs": True}, r"'epochs' .* must be int from 1 to 10000, got True \(bool\)"),
        ({"epochs": 0}, r"'epochs' .* must be int from 1 to 10000, got 0"),
        ({"epochs": 10**12}, r"'epochs' .* must be int from 1 to 10000, got 1000000000000"),
        ({"seeds": 1001}, r"'seeds' .* must be int from 1 to 1000"),
        ({"dropout": 1.0}, r"'dropout' .* must be float at least 0 and less than 1, got 1.0"),
        ({"dropout": None}, r"'dropout' .* must be float at least 0 .*, got None"),
        ({"learning_rate": -0.1}, r"'learning_rate' .* must be float more than 0"),
        ({"learning_rate": math.inf}, r"'learning_rate' .* at most 100, got inf"),
        ({"weight_decay": math.nan}, r"'weight_decay' .* must be float from 0 to 100, got nan"),
        ({"width": "1/0"}, r"'width' .* must be float from 0.015625 to 8, got '1/0'"),
        ({"arch": "vgg11"}, r"'arch' .* must be str 'vgg8' or 'vgg16' or 'resnet20', got 'vgg11'"),
        ({"epoch_images": 8}, r"'epoch_images' \(8\) is less than one batch \(32\)"),
        ({"calibration_images": 600}, r"'calibration_images' is more than nine tenths"),
        ({"allow_standin": ["shvn"]}, r"'allow_standin' names 'shvn'; did you mean 'svhn'\?"),
        ({"allow_standin": [["svhn"]]}, r"'allow_standin' names \['svhn'\]"),
        ({"results_dir": "../../elsewhere"}, r"'results_dir' .* must be str a folder in the repository, or an abs"),
        ({"results_dir": "."}, r"'results_dir'"),
        ({"results_dir": "a" * 256}, r"'results_dir'"),
        ({"data_dir": "a/" * 200}, r"'data_dir' .* must be str a path without ~, not long, got"),
        ({"data_dir": "~/data"}, r"'data_dir' .* must be str a path without ~"),
        ({"results_dir": "~/results"}, r"'results_dir'"),
        ({"profile": "quick"}, r"'profile' must be the file's name, 'smoke', got 'quick'"),
        ({"profile": "../x"}, r"'profile' .* must be str letters, digits"),
        ({"profile": "runs"}, r"'runs' is taken"),
        ({"plane_points": 5}, r"'plane_points' .* must be int 4, 7, 10"),
        ({"rows": {}}, r"'rows' lacks 'independent'"),
        ({"rows": []}, r"'rows' .* must be dict, got \[\]"),
        ({"rows": ROWS | {"x": "joint"}}, r"method 'x': no 'protocol', and no recipe of that name"),
        ({"rows": ROWS | {"x": False}}, r"method 'x' must be empty"),
        ({"rows": ROWS | {"joint distil": 1}}, r"no recipe of that name; did you mean 'joint distill'\?"),
        ({"rows": ROWS | {"joint distill": 0}}, r"method 'joint distill': 'seeds' .* must be int from 1 to 1000, got 0"),
        ({"rows": ROWS | {"x": {"protocol": "joint", "thrid": "ce"}}}, r"method 'x': unknown parameter 'thrid'.*third"),
        ({"rows": ROWS | {"x": {"protocol": "joint", "third": "cee"}}}, r"method 'x': 'third' .* got 'cee'"),
        ({"rows": ROWS | {"x": {"protocol": "independent", "third": "ce"}}}, r"only protocol 'joint' has 'third', not"),
        ({"rows": ROWS | {"joint ce": {"protocol": "independent"}}}, r"'joint ce': this name stands for 'protocol' 'j"),
        ({"rows": ROWS | {"random keys": {"keys": "none"}}}, r"'random keys': this name stands for 'keys' 'random'"),
        ({"parts": {"x": {}}}, r"method 'x': no 'protocol', and no recipe of that name"),
        ({"parts": {"joint ce": None}}, r"\['joint ce'\] are in 'rows' and in 'parts'"),
        ({"parts": {"joint_ce": {"protocol": "joint"}}}, r"labels 'joint ce' and 'joint_ce' are one in the names of results"),
        ({"parts": {3: {"protocol": "joint"}}}, r"a label is up to 64 letters, digits, .* not 3"),
        ({"parts": {"<script>": {"protocol": "joint"}}}, r"a label is up to 64 letters, digits, .* not '<script>'"),
        ({"parts": {"a | b": {"protocol": "joint"}}}, r"a label is up to 64 letters"),
        ({"parts": {"a\nb": {"protocol": "joint"}}}, r"a label is up to 64 letters"),
        ({"parts": {"a" * 81: {"protocol": "joint"}}}, r"a label is up to 64 letters"),
        ({"parts": {"x": {**KEYED, "keys": "none"}}}, r"without 'keys' 'network_width' and 'sum_width' are equal"),
        ({"parts": {"x": {"protocol": "joint", "keys": "random"}}}, r"keys want fewer channels in a network"),
        ({"parts": {"x": {**KEYED, "keys": "random", "sum_width": 0.26}}}, r"keys want fewer channels in a network than in the sum"),
        ({"parts": {"x": {**KEYED, "keys": "disjoint", "permuted_support": 0.5}}}, r"disjoint keys have no 'permuted_"),
        ({"parts": {"x": {**KEYED, "keys": "disjoint", "sum_width": 0.4}}}, r"disjoint keys want room for two"),
        ({"parts": {"x": {**KEYED, "keys": "random", "owner_statistics": True}}}, r"'owner_statistics' wants disjoint"),
        ({"parts": {"x": {"protocol": "joint", "third": "ce", "mixed_batch": True}}}, r"'mixed_batch' wants 'third: none', not 'sym"),
        ({"parts": {"x": {"protocol": "joint", "symmetric": True, "mixed_batch": True}}}, r"'mixed_batch' wants 'third: none', not 'sym"),
        ({"parts": {"x": {"protocol": "joint", "symmetric_to": "main"}}}, r"'symmetric_to' wants 'symmetric: true'"),
        ({"parts": {"x": {"protocol": "joint", "permuted_main": True}}}, r"'permuted_main' wants a 'permuted_support'"),
        ({"parts": {"x": {"protocol": "joint", "third": "ce", "superposed": True}}}, r"'superposed' wants no 'keys', no 'third' term"),
        ({"parts": {"x": {"protocol": "joint", "pruned": True, "superposed": True}}}, r"and nothing 'pruned'"),
        ({"parts": {"x": {"protocol": "sequential", "start": "shared"}}}, r"only protocol 'independent' or 'joint' has"),
        ({"parts": {"x": {"protocol": "independent", "pruned": True}}}, r"only protocol 'joint' has 'pruned'"),
        ({"parts": {"x": {"protocol": "sequential", "keys": "random"}}}, r"only protocol 'independent' or 'joint' has"),
        ({"parts": {"x": {"protocol": "joint", "quiet": -1.0}}}, r"method 'x': 'quiet' .* must be float from 0 to 1000"),
        ({"width": 8, "merged": {"x": {"protocol": "independent", "network_width": 1 / 512}}}, r"from 0.015625 to 64, got"),
        ({"halves": ["cifar10 vgg"]}, r"'halves' names 'cifar10 vgg'; did you mean 'cifar10'"),
        ({"rows": {**ROWS, "random keys, networks twice as wide": None}, "parts": {"keys alone, networks twice as wide": None}},
         r"no row with 'network_width' 0.5 is trained alone, to compare it with"),
        ({"arch": "resnet20"}, r"'arch' resnet20 has the page beside others alone"),
        ({"halves": []}, r"wants something to halve \('halves'\)"),
        ({"merged": {"disjoint keys": None}}, r"wants 'keys alone' in 'merged'"),
        ({"pages": ["04", "recipe"]}, r"'pages' names 'recipe'; known: 01, 02, 03, 04, 05"),
        ({"pages": ["03", "04"], "rows": {k: None for k in ROWS if k != "joint ce"}}, r"'rows' lacks 'joint ce', which the findings compare"),
        ({"width": 1 / 32}, r"the widths are out of bounds: a network's ≥ 1/64"),
        ({"width": 8, "parts": {"x": {**KEYED, "keys": "random", "sum_width": 4}}}, r"the sum's ≤ 16"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_key_file_and_what_was_expected(change, message):
    with pytest.raises(ParamsError, match=message) as refused:
        params.read("smoke", change)
    assert str(refused.value).startswith("params/smoke.yaml: ") and len(str(refused.value)) < 1500


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seeds: 2", r"params/mine.yaml is not YAML that can be read: 'seeds' is given twice"),
        ("seeds: 010", r"'seeds' .* must be int from 1 to 1000, got '010' \(str\)"),
        ("seeds: 1:30", r"'seeds' .* must be int from 1 to 1000, got '1:30'"),
        ("seeds: 0x10", r"'seeds' .* must be int from 1 to 1000, got '0x10'"),
        ("seeds: 1e1", r"'seeds' .* must be int from 1 to 1000, got '1e1' \(str\)"),
        ("seeds: !!int 010", r"a tag has no meaning here: tag:yaml.org,2002:int"),
        ("seeds: !!python/object/apply:os.getpid []", r"a tag has no meaning here"),
        ("seeds: 2020-01-01", r"'seeds' .* must be int"),
        ("seeds: " + "9" * 5000, r"'seeds' .* must be int"),
        ("seeds: {a: &a [*a, *a]}", r"'seeds' .* must be int"),
        ("seeds: [" * 3000, r"is not YAML that can be read"),
        ("width: .inf", r"'width' .* must be from 0.015625 to 8, got '.inf'|must be float"),
        ("width: 1e999", r"'width' .* got inf"),
        ("dropout: .nan", r"'dropout' .* must be"),
        ("parts: {x: {protocol: joint, third: ce, third: none}}", r"'third' is given twice"),
        ("parts: {~: {protocol: joint}}", r"a label is up to 64 letters"),
        ("allow_standin: &a [*a]", r"'allow_standin' names"),
        ("? [a]\n: 1", r"is not YAML that can be read"),
    ],
)
def test_a_line_of_a_file_means_what_it_looks_like_or_is_refused(write, line, message):
    key = line.split(":")[0]
    write(line, instead_of=None if line == "seeds: 2" else key)
    started = time.perf_counter()
    with pytest.raises(ParamsError, match=message):
        params.read("mine")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 5e-4", 0.0005),
        ("learning_rate: 1", 1.0),
        ("learning_rate: .5", 0.5),
        ("learning_rate: +0.25", 0.25),
        ("learning_rate: '0.25'", 0.25),
        ("learning_rate: 3/40", 0.075),
        ("data_dir: 010", "010"),
        ("data_dir: 5e-4x", "5e-4x"),
        ("seeds: +7", 7),
    ],
)
def test_a_number_is_the_number_that_is_written(write, line, value):
    key = line.split(":")[0]
    write(line, instead_of=key)
    found = getattr(params.read("mine"), key)
    assert found == value and type(found) is type(value)


def test_a_file_that_is_not_whole_is_named(write, tmp_path):
    for text, message in (
        ("profile: mine\n", r"params/mine.yaml: 'arch' \(architecture\) must be str .*, got nothing"),
        ("a: [\n", r"params/mine.yaml is not YAML"),
        ("- a\n", "must hold 'name: value' lines, got list"),
        ("", "must hold 'name: value' lines, got NoneType"),
        ("a: 1\n---\nb: 1\n", "params/mine.yaml is not YAML"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ParamsError, match=message):
            params.read("mine")
    (tmp_path / "mine.yaml").write_bytes(b"profile: \xff\n")
    with pytest.raises(ParamsError, match=r"params/mine.yaml is not YAML that can be read: .*utf-8"):
        params.read("mine")
    write()
    (tmp_path / "recipes.yaml").write_text("1: {}\nindependent: 3\n")
    with pytest.raises(ParamsError, match="method 'independent': no 'protocol', and no recipe of that name"):
        params.read("mine")
    (tmp_path / "recipes.yaml").unlink()
    with pytest.raises(ParamsError, match=r"params/recipes.yaml is not YAML that can be read"):
        params.read("mine")


def test_an_unknown_profile_gets_the_nearest():
    with pytest.raises(ParamsError, match="did you mean 'quick'"):
        params.read("quik")
    for taken in ("recipes", "../params/quick", ""):
        with pytest.raises(ParamsError, match="no parameter file"):
            params.read(taken)


def test_the_number_of_channels_decides_what_is_feasible():
    """A width of 1/32 leaves two channels in the first layer: enough for a whole network, too few for a fourth."""
    rows = {"independent": None, "joint ce": None}
    for label, width in (("random keys", 1 / 16), ("disjoint keys", 1 / 16)):
        assert params.read("smoke", {"width": width}).method(label).network_width * width * 64 == 1
    with pytest.raises(ParamsError, match=r"method '(keys alone|random keys)'.*"):
        params.read("smoke", {"width": 1 / 32, "rows": ROWS | rows})


# ---- notebooks


@pytest.mark.parametrize("name", notebook_names())
def test_a_notebooks_parameters_cell_holds_the_profile_and_nothing_else(name):
    source = parameters_cell(name)
    assert (source is None) == name.startswith("00")
    assert source is None or params._assignments(source) == ({"profile"}, {"profile": "smoke"})


@pytest.mark.parametrize("profile", PROFILES)
def test_papermill_by_hand_means_every_line_of_the_file(profile):
    assert params.from_notebook(by_papermill(profile)) == params.read(profile)


def test_what_make_injects_means_the_parameters_that_it_read():
    p = params.read("quick", {"seeds": 3, "device": "cpu"})
    notebook = load_notebook_node(jupytext.read(NOTEBOOKS / "01_mnist_cifar10.py"))
    assert params.from_notebook(history(parameterize_notebook(notebook, p.as_dict()))) == p


CELL, USE = 'profile = "smoke"', "from weightsum_lib.study import params\np = params.from_notebook(globals())"


def read_cells(*cells, **namespace):
    return params.from_notebook({"In": ["", *cells], **namespace})


def test_a_notebook_without_changes_has_the_values_of_its_profile():
    assert read_cells(CELL, USE) == params.read("smoke")
    assert read_cells("# defaults\n" + CELL, "# Parameters\n", USE, epochs=99, rows=object()) == params.read("smoke")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([CELL, "# Parameters\nepocs = 3", USE], r"parameters cell: unknown parameter 'epocs'; did you mean 'epochs'"),
        ([CELL + "\nepocs = 3", USE], "did you mean 'epochs'"),
        ([CELL, USE, "x = 3", CELL, "sedes = 3", USE], "did you mean 'seeds'"),
        ([CELL, "epochs = 3", USE, "epochs = 4\nwidht = 0.5", USE], "did you mean 'width'"),
        ([CELL, "width = float('inf')", USE], "'width' .* got inf"),
        ([CELL, 'learning_rate = "5e-3x"', USE], "'learning_rate' .* must be float more than 0, .*, got '5e-3x'"),
        (["profile = 3", USE], "'profile' .* must be str .*, got 3"),
        (['profile = "mine"', USE], "the parameters cell: 'arch' .*, got nothing"),
        (["import os\n" + CELL, USE], "must hold nothing but assignments of plain values"),
        ([CELL + "\nseeds: int = 3", USE], "must hold nothing but assignments of plain values"),
        ([CELL + "\nseeds = len('abc')", USE], "must hold nothing but assignments of plain values"),
        ([USE], "the parameters cell: 'profile' .*, got nothing"),
    ],
)  # fmt: skip
def test_an_unknown_or_impossible_parameter_is_refused_in_a_notebook(cells, message):
    with pytest.raises(ParamsError, match=message):
        read_cells(*cells)


@pytest.mark.parametrize(
    ("cells", "epochs"),
    [
        ([CELL, "epochs = 3", USE], 3),
        ([CELL + "\nepochs = 3", USE], 3),
        ([CELL + "\nepochs = 2 * 3", USE], 6),
        (
            [CELL, "epochs = 3", USE, "import os\nx = 1", "epochs_seen = p.epochs", CELL, USE],
            2,
        ),  # run again from the top
        ([CELL, "epochs = 3", USE, "x = 5", "rows = summary(p)", USE], 3),  # one cell again, after others
        ([CELL, "epochs = 3", USE, "epochs = 4", USE], 4),  # the injected cell edited, and run again
        ([CELL, USE, "MAIN = 'mnist'", "x = 1/0", "oops(", USE], 2),
        ([CELL + "\nimport os", USE, CELL + "\nepochs = 3", USE], 3),  # refused, and mended
        ([CELL, USE, CELL + "\nepochs = 7", USE, CELL, USE], 2),  # a line that was added and taken away
    ],
)
def test_cells_can_be_edited_and_run_again(cells, epochs):
    assert read_cells(*cells, epochs=99, summary=1) == params.read("smoke", {"epochs": epochs})


def test_a_profile_of_ones_own_needs_every_knob_and_given_values_win():
    values = params.read("smoke").as_dict() | {"profile": "mine"}
    lines = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    assert read_cells(CELL, lines, USE).as_dict() == values


def test_outside_ipython_the_knobs_in_the_namespace_count():
    assert params.from_notebook({"profile": "smoke", "epochs": 3, "other": 1}) == params.read("smoke", {"epochs": 3})


def test_every_knob_and_switch_says_what_it_is():
    for knob in (*fields(params.Params), *fields(Method)):
        assert knob.metadata["help"] and callable(knob.metadata["rule"][0]), knob.name
