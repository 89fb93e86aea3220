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

# %% tags=["parameters", "remove-cell"]
# Every knob has the value of params/<profile>.yaml. Add lines such as `seeds = 3` to change some; `make` and
# `papermill -f params/quick.yaml` inject theirs below.
profile = "smoke"

# %% tags=["hide-input"]
import pandas as pd
from IPython.display import Markdown

from weightsum_lib.report import findings, plots, tables
from weightsum_lib.study import measure, params
from weightsum_lib.study.params import BASELINE, DISJOINT, RANDOM, SPARSE, TRAINED
from weightsum_lib.study.runs import Study

NOTEBOOK = "04_what_transfers"
FIRST, SECOND, SUPPORT = "mnist", "svhn", "cifar10"

p = params.from_notebook(globals())  # to explore the networks that `make all` trained: params.read("quick")
study = Study(p)
plots.use_style()
shown = [TRAINED, *(m for m in p.methods if p.method(m).keys != "none")]
frame = measure.strangers(study, FIRST, SECOND, parts=True)
Markdown(tables.data_notice(study.describe_data()))

# %% [markdown]
# ## What each part adds
#
# MNIST + SVHN, never trained together and not trained after the sum, for every row that uses keys; a dense row is
# there for comparison. Statistics: `owner` for disjoint keys, else `union`. *Before* is what the network does alone: a
# part that makes the sum better by making the networks worse shows there.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, MNIST and SVHN. In each, for every combination of parts, test accuracy of the task's own network, of the sum, and of the other task's network as a control. The table below holds the same numbers."}}
policy = {m: measure.headline_policy(p, m) for m in p.methods}
sums = tables.wide(frame[frame["policy"] == frame["method"].map(policy)])
every = tables.summarize(sums, ["method", "policy", "tested"])
summary, kept = every.loc[shown], every["kept"].droplevel("policy")
random, disjoint = (" and ".join(f"{cell.mean:.0f} %" for cell in kept[m]) for m in (RANDOM, DISJOINT))
both = f"{tables.title(FIRST)} and {tables.title(SECOND)}"
plots.unmet(summary, f"Of {both}, random keys keep {random}, disjoint keys {disjoint}")

# %% tags=["hide-input"]
columns = ["before", "ensemble", "after", "kept", "other", "renamed"]
of_task = {name: tables.table(summary.xs(name, level="tested"), columns) for name in (FIRST, SECOND)}
of_task[FIRST].style.hide(axis="index").set_caption(f"On {tables.title(FIRST)}")

# %% tags=["hide-input"]
of_task[SECOND].style.hide(axis="index").set_caption(f"On {tables.title(SECOND)}")

# %% [markdown]
# The switches of each row that are not at their default (what each means: {class}`Method <weightsum_lib.Method>`):

# %% tags=["hide-input"]
switch_table = tables.switch_table({m: p.method(m) for m in shown})
switch_table.style.hide(axis="index").set_properties(**{"text-align": "left"})

# %% [markdown]
# ## The luck of the draw
#
# A network under a key computes the same function wherever its channels lie. So the same two networks can be summed
# again under fresh keys, nothing trained anew, and what the sum keeps varies with the channels that happen to collide.
# The tables above show one draw; here are ten for every pair of the random-keys recipe.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, MNIST and SVHN. For each share k of random keys, one dot for what the sum keeps under each of ten draws of the keys, and their mean. The table below holds the means."}}
recipe = tables.same_recipe(p.methods, RANDOM)
draws = tables.wide(pd.concat([measure.draws(study, m, FIRST, SECOND) for m in recipe.index]))
redrawn = tables.summarize(draws, ["method", "tested"])
luck = draws.xs((RANDOM, 0, SECOND), level=("method", "seed", "tested"))["kept"]
span = f"{luck.min():.0f} to {luck.max():.0f} % of {tables.title(SECOND)}"
plots.draws(draws, redrawn, f"The sum of one pair keeps {span}, as the draw has it ({RANDOM})")

# %% tags=["hide-input"]
redrawn_table = tables.table(redrawn, ["before", "after", "kept"])
redrawn_table.style.hide(axis="index").set_caption(f"Means of {measure.DRAWS} draws")

# %% [markdown]
# ## Accuracy against the overlap
#
# Two networks of the same size, in ever wider sums: the smaller the share k of the channels that each uses, the fewer
# they have in common. k = 0 are disjoint keys, k = 1 a dense pair. Random keys: means over the draws.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, MNIST and SVHN: test accuracy of the sum against the share of channels that the two networks have in common, with the accuracy before the sum, and lines for the control and for chance."}}
of_size = recipe[recipe["network_width"] == recipe["network_width"][RANDOM]]
overlap = {**of_size["k"], BASELINE: 1.0, TRAINED: 1.0, DISJOINT: 0.0}
least = of_size["k"].idxmin()
share, of_least = f"At k = 1/{1 / overlap[least]:g} random keys keep", redrawn["kept"][least]
kept_there = " and ".join(f"{of_least[name].mean:.0f} % of {tables.title(name)}" for name in (FIRST, SECOND))
plots.against_overlap(
    redrawn.loc[list(of_size.index)],
    every.loc[[BASELINE, TRAINED, DISJOINT]],
    overlap,
    redrawn["other"][RANDOM],
    f"{share} {kept_there}",
)

# %% [markdown]
# ## More than two
#
# θ_m + θ_s + a CIFAR-10 network. Which one? The support network of the MNIST pair has met θ_m, that of the SVHN
# pair has met θ_s, one that was trained as the main network beside inverted MNIST has met neither, and one whose support
# network learned MNIST and SVHN together has met neither network but the images of both.

# %% tags=["hide-input"]
PAIR = [(FIRST, SUPPORT, "main"), (SECOND, SUPPORT, "main")]  # task, the partner's task in training, role there
THIRDS = {
    "MNIST's support": (SUPPORT, FIRST, "support"),
    "SVHN's support": (SUPPORT, SECOND, "support"),
    "met neither": (SUPPORT, f"{FIRST} inverted", "main"),
    "met the images of both": (SUPPORT, f"{FIRST}+{SECOND}", "main"),
}
three = [
    measure.several(study, m, [*PAIR, third], seed).assign(third=label)
    for m in (TRAINED, RANDOM, DISJOINT)
    for label, third in THIRDS.items()
    if m == DISJOINT or third[2] == "support"  # the others do no better with networks that they have not met
    for seed in p.seeds_of(m)
]
of_three = tables.summarize(tables.wide(pd.concat(three)), ["method", "third", "policy", "tested"])
three_table = tables.table(of_three, ["before", "after"])
three_table.style.hide(axis="index")

# %% [markdown]
# Further tasks are the same datasets with inverted colours. Each network was trained beside CIFAR-10 (the CIFAR-10
# network beside inverted MNIST), and has met none of the others. With disjoint keys there is room for 1/k networks.
# Where a task's line rises again, the network that joined can read that task too: inverted house numbers are still
# house numbers.

# %% tags=["hide-input"] mystnb={"image": {"alt": "What each task keeps, in percent, against the number of networks in the sum under disjoint keys, one line a task."}}
JOINING = [*PAIR, THIRDS["met neither"], (f"{SECOND} inverted", SUPPORT, "main")]
grown = [
    measure.several(study, DISJOINT, JOINING[:count], 0).assign(networks=count) for count in range(2, len(JOINING) + 1)
]
growing = tables.wide(pd.concat(grown))
suffers = growing["kept"].xs(len(JOINING), level="networks").groupby("tested").first().sort_values()
plots.number_of_networks(
    growing,
    f"With {len(JOINING)} networks in the sum {tables.title(suffers.index[0])} suffers most: "
    f"it keeps {suffers.iloc[0]:.0f} %",
)

# %% [markdown]
# ## The price
#
# A network under a key of share k is a network of k times the width, and quietness takes some of its capacity. Here is
# what each network does alone, before any sum, against a dense one of full width (that of `independent`) and one of its
# own size, both trained alone for as many steps (own training task's statistics).

# %% tags=["hide-input"]
twins = {m: p.twin(m) for m in p.methods}
price = tables.price(tables.wide(frame), twins, BASELINE)
price_table = tables.table(tables.summarize(price, ["method", "tested"]), ["before", "gap_full", "gap_size"])
price_table.style.hide(axis="index")

# %% [markdown]
# ## Finding

# %% tags=["hide-input"]
# of the redrawn rows: those of the other pages, and the one with the largest networks
named = [m for m in recipe.index if m in (RANDOM, SPARSE, recipe.index[-1])]
met_none, met_images = (
    of_three.xs((DISJOINT, f"met {whom}"), level=("method", "third")).droplevel("policy")
    for whom in ("neither", "the images of both")
)
finding = findings.of_transfer(
    *(summary.loc[m].droplevel("policy") for m in (DISJOINT, RANDOM)), redrawn.loc[named], met_none, met_images
)
tables.save(
    NOTEBOOK,
    study,
    {"finding": finding, **tables.values_of(summary)},
    {**of_task, "switches": switch_table, "redrawn": redrawn_table, "three": three_table, "price": price_table},
)
Markdown(finding)
