# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Task 3: MNIST + SVHN, two networks that never met
#
# θ_m comes from task 1 and θ_s from task 2. They were trained apart, each with a CIFAR-10 network of its own, from
# streams of random numbers that share nothing. Their weights are added, with no training afterwards. Does surviving
# *one* partner teach a network to survive *any* partner?
#
# Two rows are made for this. Under **disjoint keys** each task may use its own quarter of the channels of every layer,
# by agreement: by construction that is two small networks side by side whose logits are added, so the row measures
# how quiet each is on the other's images. Under **random keys** each task draws its quarter by itself, knowing nothing
# of the other, so that about a quarter of a network's channels are the partner's too. What else these rows are
# trained with, and what each part adds, is on the [next page](04_what_transfers).

# %% tags=["parameters", "hide-input"]
# Defaults: the values of params/smoke.yaml, so that every cell answers within seconds. `make` injects
# those of params/<profile>.yaml below. What each knob means: weightsum_lib/params.py.
profile = "smoke"
arch = "vgg8"
width = 0.25
dropout = 0.25
train_images = 640
test_images = 200
calibration_images = 128
epoch_images = 576
epochs = 2
finetune_epochs = 1
batch_size = 64
learning_rate = 0.05
weight_decay = 0.0005
third_ramp = 1.0
permuted_ramp = 0.5
plane_points = 4
seeds = 1
ceiling_seeds = 1
methods = {
    "independent": {"protocol": "independent"},
    "shared start": {"protocol": "independent", "start": "shared"},
    "sequential": {"protocol": "sequential"},
    "joint ce": {"protocol": "joint", "third": "ce"},
    "joint loss_gap": {"protocol": "joint", "third": "loss_gap"},
    "joint distill": {"protocol": "joint", "third": "distill"},
    "keys alone": {"protocol": "independent", "keys": "random", "key_share": 0.25},
    "random keys": {
        "protocol": "joint",
        "third": "ce",
        "symmetric": True,
        "quiet": 1.0,
        "centered_scale": True,
        "keys": "random",
        "key_share": 0.25,
        "permuted_support": 0.8,
    },
    "disjoint keys": {
        "protocol": "joint",
        "third": "ce",
        "symmetric": True,
        "quiet": 1.0,
        "centered_scale": True,
        "keys": "disjoint",
        "key_share": 0.25,
    },
}
parts = {
    "random keys ⅛": {
        "protocol": "joint",
        "third": "ce",
        "symmetric": True,
        "quiet": 1.0,
        "centered_scale": True,
        "keys": "random",
        "key_share": 0.125,
        "wider": 2.0,
        "permuted_support": 0.8,
    },
}
allow_standin = ["mnist", "cifar10", "svhn"]
data_dir = ""
results_dir = "results"
device = "auto"
networks_at_once = 1

# %% tags=["hide-input"]
from IPython.display import Markdown

from weightsum_lib import evaluate, params, plots, results
from weightsum_lib.study import Study

NOTEBOOK = "03_mnist_svhn"
FIRST, SECOND, SUPPORT = "mnist", "svhn", "cifar10"
BASELINE, TRAINED, RANDOM, DISJOINT = params.BASELINE, params.TRAINED, params.RANDOM, params.DISJOINT

p = params.from_notebook(globals())  # to explore the networks that `make all` trained: params.read("quick")
HEADLINE = [m for m in (BASELINE, TRAINED, RANDOM, results.SPARSE, DISJOINT) if m in p.methods]  # the finding's rows
study = Study(p)
plots.use_style()
titles = {name: params.DATASETS[name] for name in (FIRST, SECOND)}
rows = evaluate.unmet_sums(study, FIRST, SECOND, SUPPORT)
Markdown(results.data_notice(study.describe_data()))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Ten example images of each dataset on this page, one of each class, in rows; stand-ins are marked."}}
plots.examples([study.dataset(FIRST), study.dataset(SECOND)], "What the networks see: a test image of each class")

# %% [markdown]
# ## Each network alone, and the sum
#
# Batch-norm statistics come from unlabelled training images of *both* tasks together (policy `union`), for each
# network alone as for the sum: nobody tells the network which task an image is from. Disjoint keys need no
# statistics at all: each channel keeps its owner's, and the state dicts are added as they are (policy `owner`).
# The green diamond is the control without which no number here means anything: the *other* task's network on these
# images, alone.

# %% tags=["hide-input"]
for name in titles:
    rows = results.with_gap(rows, f"before_{name}", f"after_{name}", suffix=f"_{name}")
measured = results.loss_split([row for row in rows if f"ensemble_{SECOND}" in row], titles)
KINDS = ("before", "after", "gap", "kept", "other", "renamed", "ensemble", "loudness", "interference", "confidence")
columns = [f"{kind}_{name}" for name in titles for kind in KINDS]
headline = [row for row in measured if row["policy"] == evaluate.headline_policy(study, row["method"])]
summary = results.summarize(headline, ["method", "policy"], columns)
by_method = {row["method"]: row for row in summary}
margins = {f"before_{name}": 1.0 for name in titles}  # points that a network may be worse than alone, and still count
counted = {m: results.counts(headline, m, evaluate.same_size_alone(study, m), margins) for m in HEADLINE[1:-1]}
finding = results.finding_unmet({m: by_method[m] for m in HEADLINE}, counted, titles)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, MNIST and SVHN. In each, for every method, test accuracy of the task's own network, of the sum, and of the other task's network as a control; the dotted line is chance. The tables below hold the same numbers."}}
shown = " and ".join(f"{by_method[DISJOINT][f'after_{name}']['mean']:.1f} % of {titles[name]}" for name in titles)
dense = " and ".join(f"{by_method[TRAINED][f'after_{name}']['mean']:.1f} %" for name in titles)
plots.unmet(summary, FIRST, SECOND, titles, f"Never met: disjoint keys read {shown}, dense {TRAINED} {dense}")

# %% [markdown]
# In the tables, *ensemble of logits* runs both networks and adds their logits: it is what a sum without any
# interference between the weights would do. A control gives SVHN's classes other names, so that two digit
# networks can't help each other. Training does not know what a class is called, so θ_s with its outputs renamed *is* a
# network trained on the renamed labels (a test shows it), and no new training is needed.

# %% tags=["hide-input"]
tables = {name: results.unmet_table(summary, name) for name in titles}
tables[FIRST].style.hide(axis="index").set_caption(f"On {titles[FIRST]}")

# %% tags=["hide-input"]
tables[SECOND].style.hide(axis="index").set_caption(f"On {titles[SECOND]}")

# %% [markdown]
# ## Why one sum works and the other does not
#
# Left: of all that happens in the sum's channels that θ_m uses, on an image of its own task, how much is θ_m's own
# doing? (The squared correlation of each channel with the same channel of θ_m alone, weighted by variance, behind the
# batch norm.) What is missing is the partner's noise. Right: the accuracy that is lost, split in two. Between each
# network and the ensemble it is lost because the other one answers *loudly* on images that are not its own; between
# the ensemble and the sum, because the weights *interfere*.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: variance in the sum explained by the MNIST network alone, layer by layer, one line for each method that the finding names. Middle and right: points of accuracy lost on MNIST and on SVHN, split into loudness of the other network and interference of the weights, one bar for each method."}}
explained = [row for m in HEADLINE for row in evaluate.explained_variance(study, m, FIRST, SECOND, SUPPORT)]
at_fc2 = {row["method"]: row["explained"] for row in explained if row["layer"] == "fc2"}
plots.why(
    explained,
    summary,
    titles,
    f"At the last hidden layer θ of {titles[FIRST]} explains {100 * at_fc2[TRAINED]:.0f} % of a dense sum, "
    f"{100 * at_fc2[RANDOM]:.0f} % under random keys, {100 * at_fc2[DISJOINT]:.0f} % under disjoint keys",
)

# %% tags=["hide-input"]
split_table = results.table(
    summary,
    {
        "method": "Method",
        **{f"loudness_{n}": f"{t}: lost to loudness (points)" for n, t in titles.items()},
        **{f"interference_{n}": f"{t}: lost to interference (points)" for n, t in titles.items()},
        **{f"confidence_{n}": f"other network's confidence on {t} (%)" for n, t in titles.items()},
    },
)
split_table.style.hide(axis="index")

# %% [markdown]
# *Confidence* is the mean largest probability that the network of the other task gives; 10 % would be perfectly quiet.
#
# ## Every batch-norm policy
#
# | Policy | Where the sum's statistics come from, and what that presumes |
# |---|---|
# | `owner` | each channel keeps its owner's; nothing but addition of the state dicts; disjoint keys only |
# | `union` | unlabelled training images of both tasks together; no task label at test time |
# | `per_task` | training images of the tested task: presumes to know which task an image is from |
# | `summed` | the two networks' statistics added; wrong wherever they share a channel (with disjoint keys it is `owner`) |
# | `batch` | the test batch's own: presumes many test images of one task at once |
#
# The headline is `owner` for disjoint keys and `union` for all others.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two tables of colours, MNIST and SVHN: test accuracy of the sum in percent for every method, in rows, and every batch-norm policy, in columns."}}
grid = results.summarize(rows, ["method", "policy"], [f"{k}_{n}" for n in titles for k in ("before", "after", "kept")])
plots.policies(
    grid,
    {f"after_{name}": f"the sum on {title} (%)" for name, title in titles.items()},
    list(evaluate.POLICIES),
    "No choice of statistics rescues a dense sum"
    if all(row[f"kept_{SECOND}"]["mean"] < 90 for row in grid if row["method"] in (BASELINE, TRAINED))
    else "The sum under every batch-norm policy",
)

# %% tags=["hide-input"]
grid_table = results.table(
    grid,
    {
        "method": "Method",
        "policy": "Policy",
        **{f"{k}_{n}": f"{t} {k} (%)" for n, t in titles.items() for k in ("before", "after")},
        "n": "n",
    },
)
grid_table.style.hide(axis="index")

# %% [markdown]
# ## As others merge, and what is the ceiling
#
# The same two networks, trained apart (`independent`), merged by the methods of the literature; `union` throughout. The
# last rows did meet: networks that were trained on both tasks.

# %% tags=["hide-input"]
merged = results.summarize(
    evaluate.merged(study, FIRST, SECOND) + evaluate.ceilings(study, FIRST, SECOND),
    ["method"],
    [f"after_{name}" for name in titles],
)
merged_table = results.table(
    merged, {"method": "Merger", **{f"after_{n}": f"{t} (%)" for n, t in titles.items()}, "n": "n"}
)
merged_table.style.hide(axis="index")

# %% [markdown]
# ## Where the sum lies
#
# The plane α·θ_m + β·θ_s on validation images, statistics from training images of the tested task. The star is the
# plain sum, the circles are the two networks alone.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Heat maps of validation accuracy over the two coefficients, one row for each method, one column for each task; a star marks the plain sum, circles the two networks alone."}}
planes = {m: evaluate.coefficient_plane(study, m, FIRST, SECOND, SUPPORT) for m in (TRAINED, DISJOINT)}
plots.plane(planes, titles, "The plain sum (star) of two networks that never met (circles), seed 0")

# %% [markdown]
# ## Finding

# %% tags=["hide-input"]
results.save(
    NOTEBOOK,
    study,
    {
        "finding": finding,
        **results.values_of(summary, columns),
        **{f"explained.{m.replace(' ', '_')}": value for m, value in at_fc2.items()},
    },
    {**tables, "split": split_table, "policies": grid_table, "merged": merged_table},
    [
        results.headline_row(
            by_method[m], f"Task 3: {titles[name]}", "θ of MNIST + θ of SVHN", by_method[m][f"other_{name}"], f"_{name}"
        )
        for name in titles
        for m in HEADLINE
    ],
)
Markdown(finding)
