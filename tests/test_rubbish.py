"""What people type, what disks do and what networks deliver: it means what it says, or is refused by name.

A sample of each runs in ``make test``, many in ``make test-hard``.
"""

import http.server
import importlib
import json
import random
import re
import shutil
import socket
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import fields, replace
from fractions import Fraction
from itertools import product
from multiprocessing.dummy import DummyProcess

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from weightsum_lib.core import models
from weightsum_lib.study import beside, data, measure, params, plan, runs, store, train
from weightsum_lib.study.data import DataError
from weightsum_lib.study.params import Method, Params, ParamsError

pytestmark = pytest.mark.no_cover  # what it covers others do, and being watched takes as long as the tests


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
    text = re.sub(r"^&\w+ ", "", text.partition(" #")[0].strip())
    text = text[1:-1] if re.fullmatch(r"'[^']*'|\"[^\"\\]*\"", text) else text
    try:
        return {str: lambda: text, int: lambda: int(Fraction(text)), float: lambda: float(Fraction(text))}[kind]()
    except (KeyError, ValueError, ZeroDivisionError, OverflowError):
        return None


def must_work(p):
    """Networks, keys and sums of the report can be built: shapes alone, on the meta device."""
    few = {"seeds": 1, "choice_seeds": min(p.choice_seeds, 1), "ceiling_seeds": min(p.ceiling_seeds, 1)}
    study = runs.Study(replace(p, device="cpu", precision="auto", **few))
    cases = [*measure.pairs(study, "mnist", "cifar10"), *measure.strangers(study, "mnist", "svhn")]
    for halved, row in product(p.halves, p.merged):
        cases += [case for candidates in beside._cases(study, halved, row, 0) for case in candidates]
    sums = dict.fromkeys(replace(case.what, draw=0) for case in cases)
    for config in {*plan.queue(study), *(member.config for what in sums for member in what.members)}:
        m = config.method
        with torch.device("meta"):
            getattr(models, config.arch)(
                config.in_channels, width=config.width * m.network_width, dropout=config.dropout
            )
        for block, role in enumerate(config.roles if m.keys != "none" else ()):
            train.key_of(config, role, m.keys, m.sum_width / m.network_width, block)
        assert config.epoch_images // config.batch_size >= 1
    for what in sums:
        keys = [what.key_of(i) for i in range(len(what.members))]
        assert what.keys == "none" or len({tuple(key.sizes.items()) for key in keys}) == 1


SMOKE = (params.PARAMS_DIR / "smoke.yaml").read_text(encoding="utf-8").replace("profile: smoke", "profile: mine")
BASE = [line.partition(" #")[0].rstrip() for line in SMOKE.splitlines() if not line.startswith("#")]


def means_what_it_says_or_is_refused(read, changes, found):
    """The parameter file with these changes; ``found`` counts."""
    lines = BASE
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


@many(60, 1500)
def test_a_parameter_file_means_what_it_says_or_is_refused_by_name(read, number):
    found = Counter()
    change = st.booleans().flatmap(lambda plausible: PLAUSIBLE if plausible else RUBBISH)  # as often as not
    some = st.lists(change, min_size=1, max_size=3)
    for_all(number, some, lambda changes: means_what_it_says_or_is_refused(read, changes, found))
    print(dict(found))
    assert found["refused"] > number / 10 and found["accepted"] > number / 20, found


@pytest.mark.parametrize("every", [97, pytest.param(1, marks=pytest.mark.hard)])
def test_every_knob_takes_what_it_can_mean_and_refuses_the_rest(read, every):
    found = Counter()
    for name, text in [*product(KNOBS, [*NUMBERS, *WORDS])][::every]:
        means_what_it_says_or_is_refused(read, [("value", name, text)], found)
    for label, switch, text in [*product(["x"], SWITCHES, [*NUMBERS, *WORDS])][::every]:
        means_what_it_says_or_is_refused(read, [("parts", label, f"{{protocol: joint, {switch}: {text}}}")], found)
    print(dict(found))
    assert found["refused"] and found["accepted"], found


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
        "".join(f"k{i}: 1\n" for i in range(1_500)),
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


# ---- prepared data files

SHARE = st.floats(0, 0.999)
TYPES = ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "bfloat16", "float32",
         "float64", "float8_e4m3fn", "float8_e5m2", "complex64"]  # fmt: skip
BYTES = st.one_of(
    st.tuples(st.just("cut"), SHARE),
    st.tuples(st.just("bit"), SHARE, st.integers(0, 7)),
    st.tuples(st.just("header"), SHARE, st.sampled_from(list(b'{}[]",:0123456789abcUIF8_ \x00\xff'))),
    st.tuples(st.just("length"), st.one_of(st.integers(0, 2000), st.integers(0, 2**64 - 1))),
    st.tuples(st.just("zeros"), SHARE, SHARE),
    st.tuples(st.just("swap"), SHARE, SHARE),
    st.tuples(
        st.just("whole"),
        st.one_of(st.sampled_from([b"", b"<html>Log in</html>", b"PK\x03\x04"]), st.binary(max_size=64)),
    ),
    st.tuples(st.just("behind"), st.binary(min_size=1, max_size=9)),
)
NAMES = st.sampled_from(["train_images", "train_labels", "test_images", "test_labels"])
TENSORS = st.one_of(
    st.tuples(st.just("type"), NAMES, st.sampled_from(TYPES)),
    st.tuples(st.just("shape"), NAMES, st.sampled_from(["fewer", "none", "flat", "turned", "deeper", "number"])),
    st.tuples(st.just("label"), st.sampled_from(["train_labels", "test_labels"]), st.integers(-(2**40), 2**40)),
    st.tuples(st.just("renamed"), NAMES, st.text(max_size=5)),
    st.tuples(st.just("more"), st.text(max_size=9), st.just("")),
    st.tuples(
        st.just("said"),
        st.sampled_from(["note", "name", "x"]),
        st.sampled_from(["<script>", "svhn", "a|b", "official"]),
    ),
    st.tuples(st.just("another set's"), st.sampled_from(["mnist", "svhn"]), st.just("")),
)


def prepared(name, seed=0):
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for part, n in (("train", 40), ("test", 20)):
        shape = (n, *data._SHAPES[name])
        tensors[f"{part}_images"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        tensors[f"{part}_labels"] = torch.arange(n) % 10
    return tensors


def damaged_bytes(content, what, at, *more):
    place = int(at * len(content)) if isinstance(at, float) else at
    made, header = bytearray(content), 8 + int.from_bytes(content[:8], "little")
    match what:
        case "cut":
            return content[:place]
        case "bit":
            made[place] ^= 1 << more[0]
        case "header":
            made[8 + int(at * (header - 8))] = more[0]
        case "length":
            made[:8] = at.to_bytes(8, "little")
        case "zeros" | "swap":
            end = place + int(more[0] * (len(content) - place))
            made[place:end] = bytes(end - place) if what == "zeros" else made[place:end][::-1]
        case "whole":
            return at
        case "behind":
            return content + at
    return bytes(made)


def damaged_tensors(tensors, about, what, name, how):
    tensors, about = dict(tensors), dict(about)
    x = tensors.get(name)
    match what:
        case "type":
            tensors[name] = x.to(getattr(torch, how))
        case "shape":
            shapes = {"fewer": x[1:], "none": x[:0], "flat": x.flatten(), "turned": x.movedim(0, -1), "deeper": x[None]}
            tensors[name] = (shapes | {"number": x.flatten()[0]})[how].contiguous()
        case "label":
            tensors[name] = torch.cat([x[:-1], torch.tensor([how])])
        case "renamed":
            tensors[how] = tensors.pop(name)
        case "more":
            tensors.setdefault(name, torch.zeros(3))
        case "said":
            about[name] = how
        case "another set's":
            tensors = prepared(name)
    return tensors, about


@many(80, 1000)
def test_a_damaged_data_file_is_refused_by_name_or_read_as_it_is(tmp_path, number):
    path, sidecar = tmp_path / "cifar10.safetensors", tmp_path / "cifar10.safetensors.sha256"
    whole, found = prepared("cifar10"), Counter()
    save_file(whole, path)
    original = path.read_bytes()

    def check(case):
        (what, *how), checksum = case
        if what in ("type", "shape", "label", "renamed", "more", "said", "another set's"):
            tensors, about = damaged_tensors(whole, {}, what, *how)
            save_file(tensors, path, about)
        else:
            path.write_bytes(damaged_bytes(original, what, *how))
        sidecar.unlink(missing_ok=True)
        if checksum is not None:
            sidecar.write_text(checksum, encoding="utf-8", errors="surrogatepass")
        same = path.read_bytes() == original
        found[f"tried: {what}"] += not same
        try:
            d = data.load("cifar10", str(tmp_path), ["cifar10"], 1000, 1000, str(tmp_path / "standins"))
        except DataError as error:
            found["refused"] += 1
            assert str(error).startswith(str(path)) and "Delete it" in str(error) and len(str(error)) < 1000
            return
        found["read"] += 1
        assert same or checksum is None, "used against its checksum"
        raw, order = load_file(path), torch.randperm(40, generator=torch.Generator().manual_seed(0))
        assert torch.equal(d.train_images, raw["train_images"][order[4:]])
        assert torch.equal(d.val_labels, raw["train_labels"][order[:4]].long())
        assert torch.equal(d.test_labels, raw["test_labels"].long()) and d.source == "real"
        assert d.note == "40 of 50,000 training and 20 of 10,000 test images, not compared with official checksums"
        assert sidecar.read_text().startswith(store.file_sha256(path))

    right = f"{store.file_sha256(path)}  cifar10.safetensors\n"
    checksums = st.one_of(
        st.just(right), st.none(), st.sampled_from(["", "\n", right[:40], "x" * 64]), st.text(max_size=70)
    )
    for_all(number, st.tuples(st.booleans().flatmap(lambda b: BYTES if b else TENSORS), checksums), check)
    print(dict(found))
    assert found["refused"] > number / 3 and found["read"] > number / 40, found


def test_another_sets_images_are_refused_where_they_are_known(tmp_path, monkeypatch):
    tensors = prepared("svhn")
    monkeypatch.setitem(data._KNOWN, data._content(tensors)[:32], ("svhn", "known"))
    for name in ("svhn", "cifar10"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    assert data.load("svhn", str(tmp_path), [], 100, 100, "").note.endswith("known")
    with pytest.raises(DataError, match=r"cifar10.safetensors is damaged or another set's"):
        data.load("cifar10", str(tmp_path), ["cifar10"], 100, 100, "")


@pytest.mark.parametrize("what", ["a folder", "a link to nothing", "a folder's checksum"])
def test_what_is_no_file_is_refused_or_is_not_there(tmp_path, monkeypatch, what):
    monkeypatch.setenv("WEIGHTSUM_NO_DOWNLOAD_SVHN", "no network")
    path = tmp_path / "svhn.safetensors"
    if what == "a folder":
        path.mkdir()
    elif what == "a link to nothing":
        path.symlink_to(tmp_path / "nothing")
    else:
        save_file(prepared("svhn"), path)
        path.with_name("svhn.safetensors.sha256").mkdir()
    with pytest.raises(DataError, match="no SVHN: there is no file" if "link" in what else f"^{path} is damaged"):
        data.load("svhn", str(tmp_path), [], 100, 100, "")


# ---- downloads: from a server that misbehaves, reached as a proxy by torchvision's own request for the official file


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """Answers each request for a file as its server is told to."""

    def do_GET(self):
        self.server.asked.append(self.path)
        getattr(self, self.server.manner)()

    do_CONNECT = do_GET  # for https

    def log_message(self, *args):
        pass

    def said(self, content, length=None):
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def page(self):
        self.said(b"<html>Log in to this network</html>")

    def wrong(self):
        self.said(random.Random(0).randbytes(100_000))

    def cut(self):
        self.said(bytes(1000), 100_000)

    def missing(self):
        self.send_error(404)

    def broken(self):
        self.send_error(500)

    def elsewhere(self):
        self.send_response(302)
        self.send_header("Location", self.path)
        self.end_headers()

    def noise(self):
        self.wfile.write(b"\x00\xff no protocol\r\n\r\n")

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()

    def silent(self):
        self.server.ended.wait(60)

    def slow(self):
        self.said(b"", 100_000)
        while not self.server.ended.wait(0.2):
            self.wfile.write(b"x")


MANNERS = ["page", "wrong", "cut", "missing", "broken", "elsewhere", "noise", "reset", "silent", "slow", "refused"]


@pytest.fixture
def server(monkeypatch):
    importlib.import_module("torchvision.datasets")  # which takes longer than the download may here
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as server:
        server.asked, server.ended, server.handle_error = [], threading.Event(), lambda *args: None
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for kind in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(kind, f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers proxies
        monkeypatch.setattr(data, "_PATIENCE", 2.0)
        yield server
        server.ended.set()
        for thread in threading.enumerate():
            if isinstance(
                thread, DummyProcess
            ):  # a download that took too long: it must not ask the next test's server
                thread.join(20)
        server.shutdown()


@pytest.mark.parametrize("name", ["svhn", "mnist", "cifar10"])
@pytest.mark.parametrize("manner", MANNERS)
def test_a_download_that_fails_ends_soon_with_a_reason_and_in_the_standin(
    tmp_path, monkeypatch, capsys, server, manner, name
):
    variable = f"WEIGHTSUM_NO_DOWNLOAD_{name.upper()}"
    monkeypatch.setenv(variable, "")
    monkeypatch.delenv(variable)
    server.manner = manner
    if manner == "refused":
        server.shutdown()
        server.socket.close()
    started = time.perf_counter()
    with pytest.raises(
        DataError, match=rf"no {params.DATASETS[name]}: there is no file and the download failed \(\w+\)"
    ):
        data.load(name, str(tmp_path), [], 40, 20, "")
    assert time.perf_counter() - started < 10
    asked = len(server.asked)
    assert 0 < asked < 20 or manner == "refused"
    said = capsys.readouterr().err
    assert re.search(
        rf"downloading {params.DATASETS[name]}, once, .*\n(.*\n)*.* could not be downloaded: \w+: .+", said
    ), said
    d = data.load(name, str(tmp_path), [name], 40, 20, str(tmp_path / "standins"))
    assert d.source == "stand-in" and re.fullmatch(r"synthetic, since .* the download failed \(\w+\)", d.note)
    assert len(server.asked) == asked, "a download was tried twice"
    assert not (tmp_path / f"{name}.safetensors").exists() and not list(tmp_path.glob(".*"))
    assert socket.getdefaulttimeout() is None
    if manner == "page":
        monkeypatch.delenv(variable)  # the next run
        with pytest.raises(DataError):
            data.load(name, str(tmp_path), [], 40, 20, "")
        assert len(server.asked) > asked
