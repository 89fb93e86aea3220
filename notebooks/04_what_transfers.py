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
# # What transfers
#
# Task 3 asks more of a network than to survive the partner that it was trained with. This page looks for what makes
# two networks that never met summable, takes the recipe apart, and then sums more than two.
#
# The parts:
#
# - **keys**: a network may use only a share k of the channels of every layer, so that another one has room beside it.
#   *Random* keys are drawn by each task for itself, and overlap in a share k of a network's channels; *disjoint* keys
#   are dealt by agreement, and don't overlap.
# - **symmetric**: the sum must keep the support task as well, so that θ_main learns not to disturb.
# - **quiet**: θ_main should answer the support task's images with a uniform distribution, and the other way round, each
#   under its own batch-norm statistics. It is what outlier exposure asks of a network (Hendrycks et al. 2019,
#   [arXiv:1812.04606](https://arxiv.org/abs/1812.04606)).
# - **permuted support**: a network whose hidden channels are permuted computes the same function, so that a partner
#   has an endless supply of disguises. In most steps the sum is made with the support network under a new random key.
# - **centered scale**: batch norm stores its scale γ as a deviation from 1. The γ of two networks add up to 2 in a
#   channel that both use, which makes just the disturbed channels the loudest; stored as deviations they add up to 1.

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

from weightsum_lib import draws, evaluate, params, plots, results
from weightsum_lib.study import Study

NOTEBOOK = "04_what_transfers"
FIRST, SECOND, SUPPORT = "mnist", "svhn", "cifar10"
BASELINE, TRAINED, RANDOM, DISJOINT = params.BASELINE, params.TRAINED, params.RANDOM, params.DISJOINT

p = params.from_notebook(globals())  # to explore the networks that `make all` trained: params.read("quick")
study = Study(p)
plots.use_style()
titles = {name: params.DATASETS[name] for name in (FIRST, SECOND)}
switches = p.methods | p.parts
keyed = [m for m in switches if p.method(m).keys != "none"]
rows = evaluate.unmet_sums(study, FIRST, SECOND, SUPPORT, parts=True)
for name in titles:
    rows = results.with_gap(rows, f"before_{name}", f"after_{name}", suffix=f"_{name}")
measured = [row for row in rows if row["policy"] == evaluate.headline_policy(study, row["method"])]
Markdown(results.data_notice(study.describe_data()))

# %% [markdown]
# ## What each part adds
#
# MNIST + SVHN, never trained together and not trained after the sum, for every row that uses keys; dense rows are
# there for comparison. Statistics: `owner` for disjoint keys, else `union`. *Before* is what the network does alone: a
# part that makes the sum better by making the networks worse shows there.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, MNIST and SVHN. In each, for every combination of parts, test accuracy of the task's own network, of the sum, and of the other task's network as a control. The table below holds the same numbers."}}
columns = [f"{kind}_{name}" for name in titles for kind in ("before", "after", "kept", "other", "renamed", "ensemble")]
summary = results.summarize(measured, ["method", "policy"], columns)
by_method = {row["method"]: row for row in summary}
parts = [by_method[m] for m in (TRAINED, *keyed)]
kept = {m: " and ".join(f"{by_method[m][f'kept_{n}']['mean']:.0f} %" for n in titles) for m in (RANDOM, DISJOINT)}
plots.unmet(
    parts,
    FIRST,
    SECOND,
    titles,
    f"Of {' and '.join(titles.values())}, random keys keep {kept[RANDOM]}, disjoint keys {kept[DISJOINT]}",
)

# %% tags=["hide-input"]
tables = {name: results.unmet_table(parts, name) for name in titles}
tables[FIRST].style.hide(axis="index").set_caption(f"On {titles[FIRST]}")

# %% tags=["hide-input"]
tables[SECOND].style.hide(axis="index").set_caption(f"On {titles[SECOND]}")

# %% [markdown]
# The switches of each row, as the parameter file has them:

# %% tags=["hide-input"]
switch_table = results.switch_table({m: switches[m] for m in (TRAINED, *keyed)})
switch_table.style.hide(axis="index").set_properties(**{"text-align": "left"})

# %% [markdown]
# ## The luck of the draw
#
# A network under a key computes the same function wherever its channels lie. So the same two networks can be summed
# again under fresh keys, nothing trained anew, and what the sum keeps varies with the channels that happen to collide.
# The tables above show one draw; here are ten for every pair of the random-keys recipe.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, MNIST and SVHN. For each share k of random keys, one dot for what the sum keeps under each of ten draws of the keys, and their mean. The table below holds the means."}}
recipe = sorted(draws.recipe_rows(study, RANDOM), key=lambda m: (draws.size(study, m), -p.method(m).key_share))
redrawn = [row for m in recipe for row in draws.redrawn(study, m, FIRST, SECOND, SUPPORT)]
redrawn_columns = [f"{kind}_{name}" for name in titles for kind in ("before", "after", "kept")]
redrawn_summary = results.summarize(redrawn, ["method"], redrawn_columns)
luck = next(row[f"draws_{SECOND}"] for row in redrawn if row["method"] == RANDOM)
plots.draws(
    redrawn,
    redrawn_summary,
    titles,
    f"The sum of one pair keeps {min(luck):.0f} to {max(luck):.0f} % of {titles[SECOND]}, as the draw has it ({RANDOM})",
)

# %% tags=["hide-input"]
redrawn_table = results.table(
    redrawn_summary,
    {
        "method": f"Method (means of {draws.DRAWS} draws)",
        **{f"{k}_{n}": f"{t} {k} (%)" for n, t in titles.items() for k in ("before", "after", "kept")},
        "n": "n",
    },
)
redrawn_table.style.hide(axis="index")

# %% [markdown]
# ## Accuracy against the overlap
#
# Two networks of the same size, in ever wider sums: the smaller the share k of the channels that each uses, the fewer
# they have in common. k = 0 are disjoint keys, k = 1 a dense pair. Random keys: means over the draws.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, MNIST and SVHN: test accuracy of the sum against the share of channels that the two networks have in common, with the accuracy before the sum, and lines for the control and for chance."}}
of_size = [row for row in redrawn_summary if draws.size(study, row["method"]) == draws.size(study, RANDOM)]
overlapping = [{**row, "line": True, "overlap": p.method(row["method"]).key_share} for row in of_size]
overlapping += [{**by_method[m], "overlap": x} for m, x in ((BASELINE, 1.0), (TRAINED, 1.0), (DISJOINT, 0.0))]
controls = {name: by_method[RANDOM][f"other_{name}"]["mean"] for name in titles}
least = min(overlapping[: len(of_size)], key=lambda row: row["overlap"])
plots.against_overlap(
    overlapping,
    titles,
    controls,
    f"At k = {least['overlap']:g} random keys keep {least[f'kept_{FIRST}']['mean']:.0f} % of {titles[FIRST]} and "
    f"{least[f'kept_{SECOND}']['mean']:.0f} % of {titles[SECOND]}",
)

# %% [markdown]
# ## More than two
#
# θ_m + θ_s + a CIFAR-10 network. Which one? The support network of the MNIST pair has met θ_m, that of the SVHN
# pair has met θ_s, one that was trained as the main network beside inverted MNIST has met neither, and one whose support
# network learned MNIST and SVHN together has met neither network but the images of both.

# %% tags=["hide-input"]
THIRDS = {
    "MNIST's support": f"{SUPPORT} beside {FIRST}",
    "SVHN's support": f"{SUPPORT} beside {SECOND}",
    "met neither": SUPPORT,
    "met the images of both": f"{SUPPORT} with {FIRST}+{SECOND}",
}
three = []
for method in (TRAINED, RANDOM, DISJOINT):
    for label, third in THIRDS.items():
        if "beside" not in third and method != DISJOINT:  # the others do no better with those that they have met
            continue
        for seed in p.seeds_of(method):
            found = evaluate.many_sum(study, method, [FIRST, SECOND, third], seed)
            row = {"method": method, "third": label, "seed": seed, "policy": evaluate.headline_policy(study, method)}
            for name, before, after in zip((FIRST, SECOND, SUPPORT), found["before"], found["after"], strict=True):
                row |= {f"before_{name}": before, f"after_{name}": after, f"kept_{name}": 100 * after / before}
            three.append(row)
all_titles = {**titles, SUPPORT: params.DATASETS[SUPPORT]}
three_columns = [f"{kind}_{name}" for name in all_titles for kind in ("before", "after", "kept")]
three_summary = results.summarize(three, ["method", "third", "policy"], three_columns)
three_table = results.table(
    three_summary,
    {
        "method": "Method",
        "third": "CIFAR-10 network",
        "policy": "Policy",
        **{f"{k}_{n}": f"{t} {k} (%)" for n, t in all_titles.items() for k in ("before", "after")},
        "n": "n",
    },
)
three_table.style.hide(axis="index")

# %% [markdown]
# Further tasks are the same datasets with inverted colours. Each network was trained beside CIFAR-10 (the CIFAR-10
# network beside inverted MNIST), and has met none of the others. With disjoint keys there is room for 1/k networks.
# Where a task's line rises again, the network that joined can read that task too: inverted house numbers are still
# house numbers.

# %% tags=["hide-input"] mystnb={"image": {"alt": "What each task keeps, in percent, against the number of networks in the sum under disjoint keys, one line a task."}}
JOINING = (FIRST, SECOND, SUPPORT, f"{SECOND} inverted")
growing = []
for count in range(2, len(JOINING) + 1):
    found = evaluate.many_sum(study, DISJOINT, JOINING[:count], 0)
    for name, before, after in zip(JOINING, found["before"], found["after"], strict=False):
        base, *inverted = name.split(" ")
        task = " ".join([params.DATASETS[base], *inverted])
        growing.append({"method": DISJOINT, "networks": count, "task": task, "kept": 100 * after / before})
suffers = min((row for row in growing if row["networks"] == len(JOINING)), key=lambda row: row["kept"])
plots.number_of_networks(
    growing, f"With {len(JOINING)} networks in the sum {suffers['task']} suffers most: it keeps {suffers['kept']:.0f} %"
)

# %% [markdown]
# ## The price
#
# A network under a key of share k is a network of k times the width, and quietness takes some of its capacity. Here is
# what each network does alone, before any sum, against a dense one of full width (that of `independent`) and one of its
# own size, both trained alone for as many steps (own training task's statistics).

# %% tags=["hide-input"]
price = results.price(rows, {m: evaluate.same_size_alone(study, m) for m in switches}, BASELINE, list(titles))
price_columns = [f"{kind}_{name}" for name in titles for kind in ("before", "gap_full", "gap_size")]
price_summary = results.summarize(price, ["method"], price_columns)
price_table = results.table(
    price_summary,
    {
        "method": "Method",
        **{f"before_{n}": f"{t} (%)" for n, t in titles.items()},
        **{f"gap_full_{n}": f"{t}: below full width (points)" for n, t in titles.items()},
        **{f"gap_size_{n}": f"{t}: below its size (points)" for n, t in titles.items()},
        "n": "n",
    },
)
price_table.style.hide(axis="index")

# %% [markdown]
# ## Finding

# %% tags=["hide-input"]
stranger, met = (
    next(r for r in three_summary if (r["method"], r["third"]) == (DISJOINT, f"met {whom}"))
    for whom in ("neither", "the images of both")
)
# of the redrawn rows: those of the other pages, and the one with the largest networks
named = [row for row in redrawn_summary if row["method"] in (RANDOM, results.SPARSE, recipe[-1])]
finding = results.finding_transfer(by_method[DISJOINT], by_method[RANDOM], named, stranger, met, titles, all_titles)
results.save(
    NOTEBOOK,
    study,
    {"finding": finding, **results.values_of(summary, columns)},
    {**tables, "switches": switch_table, "redrawn": redrawn_table, "three": three_table, "price": price_table},
)
Markdown(finding)
