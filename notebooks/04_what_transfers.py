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
# # The recipe
#
# How to train a network so that it can be added to a stranger's:
#
# 1. **Train beside a partner, with the loss on the sum**: CE + CE + the third term `ce` on both tasks' images, on a small
#    network that lies in a sum twice as wide under a random **key**: the channels of each layer that it may use (k = ½).
# 2. **Move the partner about**: in most steps it lies under a fresh key. A permuted network computes the same function, so
#    one partner is an endless supply of strangers. Batch norm stores its scale as a deviation from 1 (`centered_scale`).
# 3. **Be quiet on others' images**: each network answers the partner's images with a uniform distribution.
# 4. **Add in more room than you trained in**: each network draws a key of ⅛ or less for itself, knowing nothing of the
#    other, and a layer of fewer than 64 channels gets the room of one that has 64. The weights are added.
# 5. **Set the batch norm from each owner's images**: a channel that one network owns has its statistics from that
#    network's unlabelled training images, a shared one from both. No task label at test time. Adding the state dicts,
#    buffers and all, does without images; what each keeps is below.
#
# What to expect is below: the whole curve over k, what each part is worth (not every step above is shown to be needed),
# where the losses are, how many networks fit, and the price: the sum is wide, its networks are small, and who has
# both datasets can train one network on both instead ([task 3](03_mnist_svhn)). A deeper network has
# [a page of its own](day_04).

# %% tags=["parameters", "remove-cell"]
# Every knob has the value of params/<profile>.yaml. Add lines such as `seeds = 3` to change some; `make` and
# `papermill -f params/quick.yaml` inject theirs below.
profile = "smoke"

# %% tags=["hide-input"]
from functools import partial

import pandas as pd
from IPython.display import Markdown

from weightsum_lib.report import findings, plots, tables
from weightsum_lib.study import measure, params
from weightsum_lib.study.params import ALONE, BASELINE, DISJOINT, RANDOM
from weightsum_lib.study.runs import Study

NOTEBOOK = "04_what_transfers"
FIRST, SECOND = BOTH = ("mnist", "svhn")
HEADLINE, SPARSEST = measure.SHARE, 1 / 128  # k of the sum
SHARES = (1 / 2, 1 / 4, HEADLINE, 1 / 32, SPARSEST)

p = params.from_notebook(globals())  # to explore the networks that `make all` trained: params.read("quick")
study = Study(p)
plots.use_style()
joining, their_seeds = measure.joining(p), partial(measure.joined_seeds, p)
of_all = [member for m in (RANDOM, DISJOINT) for member in measure.members(study, m, joining, 0)]
study.train_all([member.config for member in of_all])  # side by side
recipe, plainly = "the recipe", "networks trained plainly"
equal_room = "the recipe, equal room in all layers"
lines = {
    recipe: measure.curve(study, [RANDOM], BOTH, SHARES),
    equal_room: measure.curve(study, [RANDOM], BOTH, SHARES[1:], narrow=0, draws=3),
    plainly: measure.curve(study, [ALONE], BOTH, SHARES[1:]),
    f"{plainly}, scale centred": measure.curve(study, [ALONE], BOTH, SHARES[1:], how="centered"),
    "the recipe, state dicts added": measure.curve(study, [RANDOM], BOTH, SHARES[2:], policy="summed", draws=3),
    "the recipe, policy union": measure.curve(study, [RANDOM], BOTH, SHARES[1:], policy="union", draws=3),
    "the recipe, policy per_task": measure.curve(study, [RANDOM], BOTH, SHARES[1:], policy="per_task", draws=3),
}
wide = tables.wide(pd.concat([frame.assign(line=line) for line, frame in lines.items()]))
curves = tables.summarize(wide, ["line", "share", "tested"])
kept = curves["kept"]
three = [
    measure.curve(study, [DISJOINT], [*BOTH, third]).assign(third=label) for label, third in measure.thirds(p).items()
]
of_three = tables.summarize(tables.wide(pd.concat(three)), ["third", "tested"])
finding = findings.of_recipe(kept[recipe], kept[plainly], (HEADLINE, SPARSEST), of_three["kept"]["met neither"])
Markdown(f"**The finding.** {finding}\n\n{tables.data_notice(study.describe_data())}")

# %% [markdown]
# ## How dense may keys be?
#
# MNIST + SVHN, never trained together and not trained after the sum. The networks are the same along a line: a key is a
# property of the sum, so one pair gives the whole curve. Means over draws of the keys (the recipe and networks trained
# plainly, centred or not: all that the profile has, the other lines at most three), then over seeds. *Kept* is the
# accuracy of the sum over that of the network alone.
#
# At the sparse end two keys hardly meet (a table below has the expected number of shared channels). There the sum of
# the weights is nearly the ensemble of the logits, with the recipe or without; what is lost there, under the statistics
# of each channel's owner, is lost to loud answers on the other's images. At the dense end a network has to live with
# the other in its channels as well. *Policy union*: batch-norm statistics from all images, whoever owns a channel;
# *state dicts added*: from none, beside networks as they were trained. *Policy per_task*: from the tested task's images
# alone, for every channel. That presumes to know which task an image is of, so it is no way to add networks; but it
# tells apart what is lost to the weights and what to statistics that two kinds of images have to share. *Scale
# centred*: before the sum each scale of the batch norm is written as its deviation from 1, which changes no network,
# but the sum where two share a channel; the recipe's are written so from the start. In layers of fewer than 64 channels
# a network has a smaller share than k.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, MNIST and SVHN: what the sum of two networks keeps, in percent, against the share k of the sum's channels that each network uses, one line for the recipe, for the recipe with equal room in all layers, with other batch-norm statistics, and for networks that were trained plainly. The table below holds the numbers."}}
at_headline = findings.of_each(kept[recipe, HEADLINE])
plots.kept_by_share(curves, f"Under random keys of ⅛ the sum of two strangers keeps {at_headline}")

# %% tags=["hide-input"]
curve_tables = {n: tables.by_share(kept.xs(n, level="tested")) for n in BOTH}
tables.shown(curve_tables[FIRST], f"Kept of {tables.title(FIRST)} (%)")

# %% tags=["hide-input"]
tables.shown(curve_tables[SECOND], f"Kept of {tables.title(SECOND)} (%)")

# %% [markdown]
# The recipe alone: the accuracy that is left (its interval is over seeds; beside it the standard error of the test
# images for one pair), what is kept of the ensemble of the logits (what is missing there is lost to shared channels and
# to the sum's own statistics; what the ensemble had lost before, to loud answers), what the worst
# draw of all draws of all pairs keeps, and how much the draws of one pair differ in it (standard deviation).

# %% tags=["hide-input"]
recipe_table = tables.by_task(curves.loc[recipe], ["after", "sampling", "kept_of_ensemble", "worst", "spread"])
tables.shown(recipe_table)

# %% [markdown]
# What two keys have in common, layer by layer: the expected number of channels that both networks use. Of the sum's
# weights that are not zero there are never more than its parents' together. Written out as a plain network of as
# many channels as its keys have together at most, it has up to four times one network's, however wide the sum is; the
# last line is its size.

# %% tags=["hide-input"]
room = measure.room(study, RANDOM, BOTH, SHARES)
room_table = tables.room_table(room)
tables.shown(room_table)

# %% [markdown]
# ## Where it is lost
#
# The sum at k = ⅛ with *equal* room in all layers, when keys are random in one layer and disjoint in all others. A
# share of a layer's channels collides; how large it is varies from draw to draw with a variance of one over the layer's
# room, and a layer of 8 channels that loses 2 has lost much. From that variance the rule was set, one number: a layer
# of fewer than 64 channels gets the room of one that has 64, which makes it equal wherever it was larger. What the rule
# is worth shows in the curve above (*equal room*). These bars were no part of it, and where their intervals overlap
# they say neither that it is right nor that it is wrong. Validation images, and seeds for choices alone where the
# profile has such (`choice_seeds`).

# %% tags=["hide-input"] mystnb={"image": {"alt": "Bars: points of accuracy that the sum loses against the ensemble when keys are random in one layer only, one group of bars a layer, for MNIST and SVHN."}}
choosing = {"split": "val", "seeds": p.choice_seeds_of}
one_layer = [
    measure.curve(study, [RANDOM], BOTH, narrow=0, draws=5, only=layer, **choosing).assign(layer=layer)
    for layer in room["layer"].unique()
]
by_layer = tables.summarize(tables.wide(pd.concat(one_layer)), ["layer", "tested"])
means = by_layer["interference"].map(lambda cell: cell.mean).unstack("tested")
most = " and ".join(f"in {means[n].idxmax().rpartition('.')[2]} on {tables.title(n)}" for n in BOTH)
plots.lost_by_layer(by_layer, f"Collisions in one layer alone: by the means most is lost {most}")

# %% [markdown]
# And draw by draw, at k = ⅛, test images: what a sum keeps against the share of the network's channels that the other
# one uses too. The rank correlation is that of one pair's draws, its mean and interval over the pairs.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, MNIST and SVHN: what the sum keeps, in percent, against the share of the network's channels that the other network uses too, a point for each draw of the keys, with room by layer and with equal room in all layers."}}
of_draws = wide.xs(HEADLINE, level="share")
of_draws = of_draws[of_draws.index.get_level_values("line").isin([recipe, equal_room])]
message = "What a sum of two strangers keeps, and how many channels they share"
if p.draws > 2:
    pairs = of_draws.xs(recipe, level="line").groupby(["tested", "seed"])[["shared", "kept"]]
    ranked = pairs.corr("spearman")["kept"].xs("shared", level=-1).groupby("tested").agg(tables.interval)
    message += f": rank correlation in the recipe {' and '.join(f'{ranked[n]:.2f} on {tables.title(n)}' for n in BOTH)}"
plots.by_draw(of_draws, message)

# %% [markdown]
# ## What each part is worth
#
# `keys alone` leaves out all of the training, each further row (in profiles that have them) leaves out or changes what it
# is called by; summed as the recipe is, at k = ⅛ and at ¼, where it hurts, on validation images, with seeds for choices
# alone where the profile has such (`choice_seeds`). Differences are paired by seed. One whose interval holds 0 is
# undecided, and where n is 1 it is a hint, no more. Of so many differences one in twenty lies beside 0 by chance alone:
# trust what does so in more than one cell. `mixed batch` sends both tasks' images through the sum in one batch, so that
# in training it has one set of batch-norm statistics, as afterwards; in the other rows each task's images go through by
# themselves, under their own. No row leaves out the loss on the sum alone ([Beside
# others](05_beside_others) has such networks, `quiet alone`, in profiles that have them: compare what their sum under
# random keys loses against their ensemble), or the scale that is stored as a deviation from 1, which the curve above
# shows for networks that were trained plainly.

# %% tags=["hide-input"]
compared = [RANDOM, ALONE, *p.parts_with("random")]
of_parts = tables.wide(measure.curve(study, compared, BOTH, (HEADLINE, 1 / 4), **choosing))
at = {k: tables.against(of_parts.xs(k, level="share"), RANDOM, ["before", "kept"]) for k in (HEADLINE, 1 / 4)}
parts = pd.concat([found.assign(share=k) for k, found in at.items()])
worth = at[HEADLINE][["before", "n"]]
for k, found in at.items():
    worth[f"kept at {tables.fraction(k)} (%)"] = found["kept"]
    worth[f"difference to the first row at {tables.fraction(k)} (points)"] = found["difference"]
part_table = tables.by_task(worth, [*worth.columns.drop("n")])
tables.shown(part_table, marked=[RANDOM])

# %% [markdown]
# The switches of each row that are not at their default (what each means: {class}`Method <weightsum_lib.Method>`):

# %% tags=["hide-input"]
switches = [(m, ", ".join(p.method(m).in_words())) for m in (RANDOM, ALONE, DISJOINT, *p.parts)]
switch_table = pd.DataFrame(switches, columns=["Method", "Switches"])
switch_table.style.hide(axis="index").set_properties(**{"text-align": "left"})

# %% [markdown]
# ## How many fit?
#
# Networks of further tasks join the sum, one after another: CIFAR-10, and in larger profiles other colours and quarter
# turns of the same datasets. Each was trained by the recipe beside a CIFAR-10 network (those of CIFAR-10 images beside
# inverted MNIST), and has met none of the other networks, though the images of some. The curves are the mean of MNIST
# and SVHN, which are in every sum. Under random keys they are means over as many seeds as the profile has for choices
# (without such, of one seed), under disjoint keys of one seed. The ensemble of the networks' logits stands beside every number: what it loses is lost to loudness.
# What keys can lose is the rest: to the right it stands against the expected number of *other* networks on a channel,
# (N − 1)·k in layers of 64 channels or more. Where inverted house numbers are in the sum (in larger profiles), SVHN has
# a helper: see the last table. A law of two numbers is fitted to the sums of fewer networks, and held to those of the most: kept of the
# ensemble = exp(−(c·(N − 1)·k)^b). The table says how far it holds. It counts only what keys lose, not what loudness
# does.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: what MNIST and SVHN keep on average, in percent, against the number of networks in the sum, one line for each share k of random keys and one for disjoint keys. Right: what random keys keep of the ensemble against the expected number of other networks on a channel, with the fitted law."}}
COUNTS = (2, 4, 8) if len(joining) == 8 else (2, 3)
grown = [
    measure.curve(study, [m], joining[:n], SHARES[1:], draws=3, seeds=their_seeds).assign(networks=n)
    for m in (RANDOM, DISJOINT)
    for n in COUNTS
]
growing = tables.wide(pd.concat(grown))
in_all = growing[growing.index.get_level_values("tested").isin(BOTH)]
of_random = in_all.xs(RANDOM, level="method")
cells = of_random.groupby(["networks", "share"])["kept_of_ensemble"].mean()
law, law_table = findings.capacity(cells, COUNTS[:-1])
most = of_random.xs(COUNTS[-1], level="networks").groupby(["tested", "share"])["kept"].mean()
each = [f"{tables.title(n)} keeps {most[n, SPARSEST]:.0f} and {most[n, HEADLINE]:.0f} %" for n in BOTH]
plots.capacity(in_all, law.kept, f"Of {COUNTS[-1]} strangers {', '.join(each)} on average, at k = 1/128 and at ⅛")

# %% tags=["hide-input"]
tables.shown(law_table)

# %% tags=["hide-input"]
found, by_law = (law_table[column].astype(float) for column in law_table.columns[3:5])
misses = (found - by_law).abs()
fitting = {tables.fraction(k): max((n for n in COUNTS if cells[n, k] >= 99), default=1) for k in SHARES[1:]}
Markdown(
    "Of the ensemble 99 % is kept, the mean of MNIST and SVHN, with up to so many networks, of those that were measured "
    f"({', '.join(map(str, COUNTS))}; 1: no sum): "
    + ", ".join(f"{n} at {k}" for k, n in fitting.items())
    + f". By the law (c = {law.scale:.3g}, b = {law.power:.2f}) it would be "
    + ", ".join(f"{law.networks(k, 99)} at {tables.fraction(k)}" for k in SHARES[1:])
    + ", but where it says 90 % or more it "
    f"misses the table by up to {misses[by_law >= 90].max():.1f} points (anywhere by up to {misses.max():.1f}). It counts "
    "what keys lose, not what the ensemble itself has lost to loudness; single tasks lie above and below the mean. Under "
    "disjoint keys, which are agreed on, it is 1 / k of them."
)

# %% [markdown]
# Task by task, in the largest sum. The control is the best that any of the other networks reads of a task: some
# tasks do help each other (inverted house numbers are house numbers). Where it reads as much as the sum or more, the
# number does not show that the task's own network is kept.

# %% tags=["hide-input"]
several = tables.summarize(growing, ["method", "share", "networks", "tested"])
of_most = several.xs(COUNTS[-1], level="networks").loc[RANDOM]
several_table = tables.by_task(of_most, ["before", "other", "ensemble", "after", "kept"])
tables.shown(several_table)

# %% [markdown]
# ## Loudness, the open problem of more than two
#
# θ_m + θ_s + a CIFAR-10 network under disjoint keys, where nothing collides. Which CIFAR-10 network? The support
# network of the MNIST pair has met θ_m, that of the SVHN pair has met θ_s, one that was trained as the main network
# beside inverted MNIST has met neither, and (in profiles that have it) one whose support network learned MNIST and SVHN
# together has met neither network but the images of both. Compare what a task loses where the third network was shown
# its images, and where it was not.

# %% tags=["hide-input"]
three_table = tables.by_task(of_three, ["before", "ensemble", "after", "kept"])
tables.shown(three_table)

# %% [markdown]
# Is a network quieter on strangers' images if it was taught to be quiet on more kinds? Each row below but the first (in
# profiles that have such) was trained to answer uniformly not only on its partner's images but also on images of no
# task: coloured *noise* that changes every 1 to 8 pixels, *patches* (both tasks' images cut into 16 pieces and
# shuffled), or *any of these*, blends of two images among them. Three networks, none of which has met another, on
# validation images; differences are paired by seed. *Kept* is against the row's own networks, which may read less
# alone: *before* and *after* say.

# %% tags=["hide-input"]
loud = measure.curve(study, [DISJOINT, *p.parts_with("disjoint")], [*BOTH, measure.NEITHER], **choosing)
columns = ["before", "ensemble", "after", "kept"]
loud_table = tables.by_task(tables.against(tables.wide(loud), DISJOINT, columns), [*columns, "difference"])
tables.shown(loud_table, marked=[DISJOINT])

# %% [markdown]
# ## The price
#
# A network under a key is a small network, and quietness and strange partners take some of its capacity. Here is what
# each does alone, before any sum, against a dense one of the profile's width (that of `independent`) and one of its own
# size, both trained alone for as many steps (statistics of the own task's images), each on the seeds that both rows
# have. What *counts* in the table of [task 3](03_mnist_svhn) is the last of these: the whole interval below one point.

# %% tags=["hide-input"]
sums = tables.wide(measure.frame(study, measure.strangers(study, FIRST, SECOND)))
price = tables.summarize(tables.price(sums, {m: p.twin(m) for m in p.methods}, BASELINE), ["method", "tested"])
price_table = tables.table(price, ["before", "gap_full", "gap_size"])
tables.shown(price_table, marked=[RANDOM])

# %% [markdown]
# ## Finding

# %% tags=["hide-input"]
tables.save(
    NOTEBOOK,
    study,
    {"finding": finding, "law.scale": law.scale, "law.power": law.power},
    {
        **curve_tables,
        "recipe": recipe_table,
        "room": room_table,
        "parts": part_table,
        "switches": switch_table,
        "several": several_table,
        "law": law_table,
        "three": three_table,
        "loudness": loud_table,
        "price": price_table,
    },
    intervals={k: cell for found in (curves, parts, of_three, price) for k, cell in tables.intervals_of(found).items()},
    rows=wide,
)
Markdown(finding)
