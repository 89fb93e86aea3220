"""What people type, what disks do and what networks deliver: it means what it says, or is refused by name.

A sample of each runs in ``make test``, many in ``make test-hard``.
"""

import json
import re
import shutil
import time
from collections import Counter
from dataclasses import fields, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from weightsum_lib.core import models
from weightsum_lib.study import measure, params, runs, store
from weightsum_lib.study.params import Method, Params, ParamsError


def many(sample, most):
    """Numbers of generated cases: a sample, and what ``make test-hard`` tries."""
    return pytest.mark.parametrize("number", [sample, pytest.param(most, marks=pytest.mark.hard)])


def for_all(number, strategy, check):
    """Call ``check`` with so many generated cases; those of a sample are the same each time."""
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    options["phases"] = [Phase.generate]  # a case is small as it is
    settings(max_examples=number, derandomize=number < 500, **options)(given(strategy)(check))()


# ---- parameter files

KNOBS = {f.name: f.type for f in fields(Params)}
SWITCHES = {f.name: f.type for f in fields(Method)}
NUMBERS = ["0", "1", "2", "3", "7", "100", "010", "-1", "+2", "1:30", "0x10", "0o7", "1_000", "1e3", "5e-4", ".5", "5.",
           "1/4", "1/16", "2/0", "1/2/3", "/2", ".inf", "-.inf", ".nan", "nan", "inf", "1e999", "10**9", "1000000000000",
           "-0.0", "9" * 400, "٣", "½", "1 000", "1,5"]  # fmt: skip
WORDS = ["true", "false", "True", "yes", "no", "off", "null", "~", "", '""', "''", "'2'", '"0.25"', "vgg8", "vgg16", "auto",
         "cpu", "cuda", "joint", "independent", "random", "disjoint", "ce", "distill", "[]", "{}", "[1, 2]", "{a: 1}",
         "[mnist]", "[mnist, svhn, cifar10]", "[minst]", "[[mnist]]", "!!int 3", "!!python/object/apply:os.getpid []",
         "!x y", "&a 3", "*a", "&a [*a]", "2020-01-01", "data", "../../elsewhere", "/tmp/x", "~/results", ".", "a/../..",
         "a" * 300, "x/" * 3000, "| \n  a", "> \n  a", "? a", "- a", "%TAG", "@a", "`a", "a\tb", "\x07", "\u202e", "\ufeff",
         "<script>", "a|b", "$(id)", "{{x}}", "${HOME}"]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=12),
)
LABELS = st.one_of(
    st.sampled_from(["joint ce", "joint_ce", "Joint CE", "random keys", "joint distill", "x", "3", "a b", "a_b", "a  b", "<b>",
                     "a|b", "`a`", "[a](b)", "$x$", "*a*", "θ, 1/16 × 2", "ß", "ss", "../x", "a" * 64, "a" * 65, "-", "null"]),
    st.text(min_size=1, max_size=10),
)  # fmt: skip
ROW = st.one_of(
    VALUES,
    st.dictionaries(
        st.sampled_from([*SWITCHES, "thrid"]), st.one_of(VALUES, st.sampled_from(["1/4", "1/2", "2", "joint", "random"])),
        max_size=5,
    ).map(lambda row: "{" + ", ".join(f"{k}: {v}" for k, v in ({"protocol": "joint"} | row).items()) + "}"),
)  # fmt: skip
# one change of a file of lines: what is done, to which line (a share of them), and with what
SANE = {int: st.integers(1, 999).map(str), bool: st.sampled_from(["true", "false"]), str: st.sampled_from(["data", "x y"]),
        float: st.one_of(st.floats(0, 1).map(repr), st.sampled_from(["1/4", "1/2", "1", "5e-4", ".5"]))}  # fmt: skip
PLAUSIBLE = st.one_of(
    st.sampled_from([n for n, kind in KNOBS.items() if kind in SANE]).flatmap(
        lambda name: st.tuples(st.just("value"), st.just(name), SANE[KNOBS[name]])
    ),
    st.tuples(
        st.sampled_from(["rows", "parts"]), LABELS, st.sampled_from(["{protocol: joint}", "{protocol: sequential}"])
    ),
)
RUBBISH = st.one_of(
    st.tuples(st.just("value"), st.sampled_from([*KNOBS]), VALUES),
    st.tuples(st.sampled_from(["rows", "parts"]), LABELS, ROW),
    st.tuples(st.sampled_from(["rows", "parts"]), st.sampled_from(["joint ce", "joint distill", "keys, ce"]), ROW),
    st.tuples(st.sampled_from(["delete", "double", "cut", "typo"]), st.floats(0, 0.999), st.just("")),
    st.tuples(st.sampled_from(["line", "insert"]), st.floats(0, 0.999), st.text(max_size=30)),
)


def changed(lines, change):
    """The lines of a parameter file with one change."""
    what, where, text = change
    lines = list(lines)
    if what in ("value", "rows", "parts"):
        key = where if what == "value" else what
        at = next((i for i, line in enumerate(lines) if line.startswith(f"{key}:")), None)
        if at is None:
            return lines
        if what == "value":
            end = next((i for i in range(at + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
            return [*lines[:at], f"{key}: {text}", *lines[end:]]
        return [*lines[: at + 1], f"  {where}: {text}", *lines[at + 1 :]]
    at, place = int(where * len(lines)), int(where * sum(len(line) + 1 for line in lines))
    if what == "typo":
        key, colon, rest = lines[at].partition(":")
        lines[at] = key[:-2] + key[:-3:-1] + colon + rest
    elif what in ("delete", "double"):
        lines[at : at + 1] = [lines[at]] * (2 * (what == "double"))
    elif what == "line":
        lines.insert(at, text)
    else:
        whole = "\n".join(lines)
        return (whole[:place] + text + (whole[place:] if what == "insert" else "")).split("\n")
    return lines


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a profile `mine` from these bytes."""
    shutil.copy(params.PARAMS_DIR / "recipes.yaml", tmp_path)
    monkeypatch.setattr(params, "PARAMS_DIR", tmp_path)

    def read(content):
        (tmp_path / "mine.yaml").write_bytes(content)
        return params.read("mine")

    return read


def says(kind, text):
    """What a plain text says, by another reading than the library's; None if it says nothing of that kind."""
    text = text.partition(" #")[0].strip()
    text = text[1:-1] if re.fullmatch(r"'[^']*'|\"[^\"\\]*\"", text) else text
    try:
        return {str: lambda: text, int: lambda: int(Fraction(text)), float: lambda: float(Fraction(text))}[kind]()
    except (KeyError, ValueError, ZeroDivisionError, OverflowError):
        return None


def must_work(p):
    """Networks, keys and sums of the report can be built: shapes alone, on the meta device."""
    few = {"seeds": 1, "choice_seeds": min(p.choice_seeds, 1), "ceiling_seeds": min(p.ceiling_seeds, 1)}
    study = runs.Study(replace(p, device="cpu", precision="auto", **few))
    for config in measure.queue(study):
        with torch.device("meta"):
            wide = config.width * config.method.network_width
            getattr(models, config.arch)(config.in_channels, width=wide, dropout=config.dropout)
        if config.method.protocol == "joint" and config.method.keys != "none":
            m = config.method
            for block, role in enumerate(("main", "support")):
                runs.train.key_of(config, role, m.keys, m.sum_width / m.network_width, block)
        assert config.epoch_images // config.batch_size >= 1
    cases = [*measure._pairs(study, "mnist", "cifar10"), *measure._strangers(study, "mnist", "svhn")]
    for what in dict.fromkeys(replace(case.what, draw=0) for case in cases):
        keys = [what.key_of(i) for i in range(len(what.members))]
        assert what.keys == "none" or len({tuple(key.sizes.items()) for key in keys}) == 1


@many(60, 1500)
def test_a_parameter_file_means_what_it_says_or_is_refused_by_name(read, number):
    base = [line.partition(" #")[0].rstrip() for line in SMOKE.splitlines() if not line.startswith("#")]
    found = Counter()

    def check(changes):
        lines = base
        for change in changes:
            lines = changed(lines, change)
        text = "\n".join(lines)
        started = time.process_time()
        try:
            p = read(text.encode("utf-8", "surrogatepass"))
        except ParamsError as error:
            found["refused"] += 1
            said = str(error)
            assert said.startswith("params/mine.yaml") and len(said) < 3000, said
            assert time.process_time() - started < 1
            return
        finally:
            found["tried"] += 1
        assert time.process_time() - started < 1
        found["accepted"] += 1
        assert params.check(json.loads(json.dumps(p.as_dict())), "a copy") == p
        for name, kind in KNOBS.items():
            written = [line.partition(":")[2] for line in lines if line.startswith(f"{name}:")]
            assert len(written) == 1, f"{name} is given {len(written)} times"
            if kind in (int, float):
                assert getattr(p, name) == says(kind, written[0]), (name, written)
        assert len({params.slug(label) for label in p.methods}) == len(p.methods)
        for label in p.methods:
            assert not set(label) & set("<>|`*[]{}$&\\\n\"'") and label == label.strip(), label
        folder = (store.ROOT / p.results_dir).resolve()
        assert p.results_dir.startswith("/") or (folder.is_relative_to(store.ROOT) and folder != store.ROOT)
        (store.ROOT / p.data_dir / "mnist.safetensors").exists()  # no error of the system's
        must_work(p)

    change = st.booleans().flatmap(lambda plausible: PLAUSIBLE if plausible else RUBBISH)  # as often as not
    for_all(number, st.lists(change, min_size=1, max_size=3), check)
    print(dict(found))
    assert found["refused"] > number / 10 and found["accepted"] > number / 20, found


SMOKE = (params.PARAMS_DIR / "smoke.yaml").read_text(encoding="utf-8").replace("profile: smoke", "profile: mine")


@many(20, 300)
def test_bytes_that_are_no_parameter_file_are_refused_by_name(read, number):
    def check(content):
        with pytest.raises(ParamsError, match=r"^params/mine.yaml"):
            read(content)

    for_all(number, st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)), check)


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 30)),
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
        "a: &a {<<: *a}\n",
        "".join(f"k{i}: 1\n" for i in range(4_000)),
        "".join(f"k{i}: 1\n" for i in range(100_000)),
        "x: " + "{a: " * 2000,
        "seeds: " + "1" * 5_000_000,
    ],
    ids=["merges", "aliases", "a merge of itself", "many keys", "more keys", "deep", "long"],
)
def test_a_file_made_to_take_long_is_refused_in_under_a_second(read, text):
    started = time.process_time()
    with pytest.raises(ParamsError, match=r"^params/mine.yaml"):
        read((SMOKE + text).encode())
    assert time.process_time() - started < 1
