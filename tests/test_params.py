import ast
from dataclasses import replace

import pytest
import yaml

from weightsum_lib import params, results
from weightsum_lib.params import ParamsError
from weightsum_lib.run import NOTEBOOKS, notebook_names

KEYED = {"protocol": "joint", "third": "ce", "key_share": 0.25}
PAIR = {
    "independent": {"protocol": "independent"},
    "joint ce": {"protocol": "joint", "third": "ce"},
    "random keys": {**KEYED, "keys": "random"},
    "disjoint keys": {**KEYED, "keys": "disjoint"},
}


def parameters_cell(name):
    """The names and values that a notebook's parameters cell sets, or None without such a cell."""
    source = (NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8")
    if 'tags=["parameters"' not in source:
        return None
    cell = source.split('tags=["parameters"', 1)[1].split("\n# %%", 1)[0].split("\n", 1)[1]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell).body}


@pytest.mark.parametrize("profile", ["smoke", "quick", "hour", "full"])
def test_each_profile_is_whole(profile):
    p = params.read(profile)
    assert p.profile == profile
    if results.SPARSE in p.methods:  # the report calls it "in a sum four times as wide"
        recipe = p.method(params.RANDOM)
        wanted = replace(recipe, key_share=1 / 16, wider=4 * recipe.wider, seeds=p.method(results.SPARSE).seeds)
        assert p.method(results.SPARSE) == wanted


def test_the_profiles_are_what_they_promise():
    full = params.read("full")
    assert (full.arch, full.width, full.allow_standin, full.device) == ("vgg16", 1.0, [], "cuda")
    assert params.read("quick").allow_standin == list(params.DATASETS)
    assert params.read("smoke").data_dir == ""


@pytest.mark.parametrize("name", [n for n in notebook_names() if parameters_cell(n)])
def test_a_notebook_declares_every_knob_with_the_values_of_smoke(name):
    assert parameters_cell(name) == yaml.safe_load((params.PARAMS_DIR / "smoke.yaml").read_text())


def test_only_the_first_notebook_takes_no_parameters():
    assert [n for n in notebook_names() if parameters_cell(n) is None] == ["00_how_to_sum"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epocs": 3}, r"params/smoke.yaml: unknown parameter 'epocs'; did you mean 'epochs'\?"),
        ({"epochs": "3"}, r"params/smoke.yaml: 'epochs' .* must be int, got '3' \(str\)"),
        ({"epochs": True}, r"'epochs' .* must be int, got True"),
        ({"epochs": 0}, r"'epochs' .* must be ≥ 1, got 0"),
        ({"dropout": 1.0}, r"'dropout' .* must be at least 0 and less than 1, got 1.0"),
        ({"learning_rate": -0.1}, r"'learning_rate' .* must be > 0"),
        ({"arch": "vgg11"}, r"'arch' .* must be 'vgg8' or 'vgg16', got 'vgg11'"),
        ({"epoch_images": 8}, r"'epoch_images' \(8\) is less than one batch \(64\)"),
        ({"allow_standin": ["shvn"]}, r"'allow_standin' names 'shvn'; did you mean 'svhn'\?"),
        ({"methods": {}}, r"'methods' lacks 'independent'"),
        ({"profile": "quick"}, r"'profile' must be the file's name, 'smoke', got 'quick'"),
        ({"plane_points": 5}, r"'plane_points' .* must be 4, 7, 10"),
        ({"methods": PAIR | {"x": "joint"}}, r"method 'x' must be switches"),
        (
            {"methods": PAIR | {"x": {"protocol": "joint", "thrid": "ce"}}},
            r"method 'x': unknown parameter 'thrid'.*'third'",
        ),
        ({"methods": PAIR | {"x": {"protocol": "joint", "third": "cee"}}}, r"method 'x': 'third' .* got 'cee'"),
        (
            {"methods": PAIR | {"x": {"protocol": "independent", "third": "ce"}}},
            r"only protocol 'joint' has 'third', not 'independent'",
        ),
        ({"methods": PAIR | {"x": {}}}, r"method 'x': 'protocol' is missing"),
        ({"parts": {"x": {}}}, r"method 'x': 'protocol' is missing"),
        ({"parts": {"joint ce": {"protocol": "joint"}}}, r"'joint ce' is in 'methods' and in 'parts'"),
        ({"parts": {"x": {**KEYED, "keys": "none"}}}, r"method 'x': 'keys' and a 'key_share' below 1 go together"),
        ({"parts": {"x": {**KEYED, "keys": "disjoint", "permuted_support": 0.5}}}, r"disjoint keys want key_share ≤ ½"),
        ({"parts": {"x": {**KEYED, "keys": "random", "owner_statistics": True}}}, r"'owner_statistics' wants disjoint"),
        ({"parts": {"x": {"protocol": "joint", "symmetric_to": "main"}}}, r"'symmetric_to' wants 'symmetric: true'"),
        ({"parts": {"x": {"protocol": "joint", "start": "shared"}}}, r"only protocol 'independent' has 'start'"),
        ({"parts": {"x": {"protocol": "sequential", "keys": "random"}}}, r"'sequential' takes the networks of"),
        ({"parts": {"x": {"protocol": "joint", "quiet": -1.0}}}, r"method 'x': 'quiet' .* must be ≥ 0, got -1.0"),
    ],
)
def test_what_cannot_be_is_refused_with_key_file_and_what_was_expected(change, message):
    with pytest.raises(ParamsError, match=message):
        params.read("smoke", change)


def test_a_missing_knob_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(params, "PARAMS_DIR", tmp_path)
    (tmp_path / "mine.yaml").write_text("profile: mine\n")
    with pytest.raises(ParamsError, match=r"params/mine.yaml: 'arch' is missing \(architecture\)"):
        params.read("mine")
    (tmp_path / "mine.yaml").write_text("a: [\n")
    with pytest.raises(ParamsError, match=r"params/mine.yaml is not YAML"):
        params.read("mine")
    (tmp_path / "mine.yaml").write_text("- a\n")
    with pytest.raises(ParamsError, match="must hold 'name: value' lines, got list"):
        params.read("mine")


def test_an_unknown_profile_gets_the_nearest():
    with pytest.raises(ParamsError, match="did you mean 'quick'"):
        params.read("quik")


def test_whole_numbers_serve_as_floats_and_methods_get_their_defaults():
    p = params.read("smoke", {"width": 1})
    assert p.width == 1.0 and type(p.width) is float
    assert p.method("joint ce").third_weight == 1.0 and p.method("independent").third == "none"
    p = params.read(
        "smoke", {"seeds": 3, "methods": PAIR | {"a": {"protocol": "joint", "seeds": 2}, "b": {"protocol": "joint"}}}
    )
    assert [len(p.seeds_of(m)) for m in "ab"] == [2, 3]


def test_a_notebook_that_misses_a_knob_is_told():
    values = params.read("smoke").as_dict()
    assert params.from_notebook({**values, "other": 1}) == params.read("smoke")
    del values["epochs"]
    with pytest.raises(ParamsError, match="the parameters cell: 'epochs' is missing"):
        params.from_notebook(values)
