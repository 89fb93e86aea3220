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
# θ_m comes from task 1 and θ_s from task 2; the two never met. Each was trained alone (`independent` of either width,
# `shared start`, `keys alone`) or beside a CIFAR-10 network of its own (all other rows). They share no random numbers,
# but for their start in `shared start`. Their weights are added, with no training afterwards. Does surviving *one*
# partner teach a network to survive *any* partner? (Hold `joint ce` against `independent`, with the classes of SVHN
# renamed: else one digit network helps the other.)
#
# Two rows are made for this. Under **disjoint keys** each task may use its own quarter of the channels of every layer,
# by agreement: by construction that is two small networks side by side whose logits are added, so the row measures how
# quiet each is on the other's images. Under **random keys** each network draws an eighth of the sum's channels by
# itself, knowing nothing of the other, so that some of its channels are the partner's too; a layer of fewer than 64
# channels gets the room of one that has 64. What is agreed is the size of the sum, and the kind of images to be quiet
# on. `keys alone` are small networks that were trained plainly, and added under keys drawn in the same way. Is it only
# the width of the sum? Dense networks *twice as wide* (in profiles that have them) are as wide as the sum under random
# keys is in its widest layers. What each part of the training adds, and denser and sparser keys, are on the [next
# page](04_what_transfers).

# %% tags=["parameters", "remove-cell"]
# Every knob has the value of params/<profile>.yaml. Add lines such as `seeds = 3` to change some; `make` and
# `papermill -f params/quick.yaml` inject theirs below.
profile = "smoke"

# %% tags=["hide-input"]
import pandas as pd
from IPython.display import Markdown

from weightsum_lib.report import findings, plots, tables
from weightsum_lib.study import beside, measure, params
from weightsum_lib.study.params import ALONE, BASELINE, DISJOINT, RANDOM, TRAINED
from weightsum_lib.study.runs import Study

NOTEBOOK = "03_mnist_svhn"
FIRST, SECOND = "mnist", "svhn"

p = params.from_notebook(globals())  # to explore the networks that `make all` trained: params.read("quick")
HEADLINE = [BASELINE, TRAINED, ALONE, RANDOM, DISJOINT]  # the rows that the front page shows
study = Study(p)
plots.use_style()
policy = {m: measure.headline_policy(p, m) for m in p.rows}
every_policy = tables.wide(measure.frame(study, measure.strangers(study, FIRST, SECOND)))
levels = every_policy.index.to_frame()
sums = every_policy[levels["policy"] == levels["method"].map(policy)]
summary = tables.summarize(sums, ["method", "tested"])
margins = {FIRST: 1.0, SECOND: 1.0}  # points that a network may be worse than alone, and still count
of_own_images = every_policy.xs("union", level="policy")  # beside which networks alone have statistics of their task's
counted = {m: findings.counts(of_own_images, m, p.twin(m), margins) for m in summary.index.unique("method")}
finding = findings.of_strangers(summary, counted)
Markdown(f"**The finding.** {finding}\n\n{tables.data_notice(study.describe_data())}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Ten example images of each dataset on this page, one of each class, in rows; stand-ins are marked."}}
shown = [study.dataset(FIRST), study.dataset(SECOND)]
plots.examples(shown, "What the networks see: a test image of each class", p.in_channels)

# %% [markdown]
# ## Each network alone, and the sum
#
# The batch-norm statistics of each network alone are those of its own task (unlabelled training images), whatever it is
# tested on. Those of a sum come from training images too, as many of each task, and nobody tells the network which task
# a test image is from: of dense networks from images of *both* tasks (policy `union`); under random keys for each
# channel from images of the task whose network has it, of both where they share it (`by_owner`). Disjoint keys need no
# images: the state dicts are added as they are (`summed`), and compared with the networks as they are, under the
# running statistics of training. Under random keys each row is the mean of all draws of the keys that the profile has
# (`draws`). The green diamond is the control without which no number here means anything: the *other* task's network on
# these images, alone.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, MNIST and SVHN. In each, for every method, test accuracy of the task's own network, of the sum, and of the other task's network as a control; the dotted line is chance. The tables below hold the same numbers."}}
keyed, dense = (findings.of_each(summary.loc[m, "after"]) for m in (RANDOM, TRAINED))
plots.before_after(summary, f"Never met: random keys read {keyed}, dense {TRAINED} {dense}")

# %% [markdown]
# *Kept* is after over before, in percent, of which chance alone keeps about a tenth; in brackets stands the 95 %
# interval over n seeds. A control gives SVHN's classes other names, so that two digit networks can't help each other.
# Training does not know what a class is called, so θ_s with its outputs renamed *is* a network trained on the renamed
# labels, and no new training is needed. *Counts*: before the sum, both networks are not worse than dense ones of their
# size that were trained alone as long, by more than a point: yes or no where the whole 95 % interval of the paired
# difference says so, else undecided (all under statistics of their own task's images).

# %% tags=["hide-input"]
summary["counts"] = summary.index.get_level_values("method").map(counted)
columns = ["before", "after", "kept", "worst", "other", "renamed", "counts"]
of_task = {name: tables.table(summary.xs(name, level="tested"), columns) for name in (FIRST, SECOND)}
MARKED = [TRAINED, RANDOM, DISJOINT]
tables.shown(of_task[FIRST], f"On {tables.title(FIRST)}", MARKED)

# %% tags=["hide-input"]
tables.shown(of_task[SECOND], f"On {tables.title(SECOND)}", MARKED)

# %% [markdown]
# ## Why one sum works and the other does not
#
# Above: of all that happens in the sum's channels that θ_m uses, on an image of its own task, how much is θ_m's own
# doing? (The squared correlation of each channel with the same channel of θ_m alone, weighted by variance, behind the
# batch norm.) What is missing is the partner's noise. Below: the accuracy that is lost, split in two. Between each
# network and the ensemble it is lost because the other one answers *loudly* on images that are not its own; between the
# ensemble and the sum, because the weights *interfere* and because a sum has statistics of its own (a negative number
# in the tables: these helped; bars end at 0).

# %% tags=["hide-input"] mystnb={"image": {"alt": "Top: variance in the sum explained by the MNIST network alone, layer by layer, one line for each method of the front page. Bottom: points of accuracy lost on MNIST and on SVHN, split into loudness of the other network and interference of the weights, one bar for each method."}}
explained = pd.concat([measure.explained(study, m, FIRST, SECOND) for m in HEADLINE])
at_fc2 = explained[explained["layer"] == "fc2"].set_index("method")["explained"]
plots.why(
    explained,
    summary,
    f"At the last hidden layer θ of {tables.title(FIRST)} explains {100 * at_fc2[TRAINED]:.0f} % of a dense sum, "
    f"{100 * at_fc2[RANDOM]:.0f} % under random keys, {100 * at_fc2[DISJOINT]:.0f} % under disjoint keys",
)

# %% tags=["hide-input"]
columns = ["ensemble", "loudness", "interference", "confidence"]
split = {name: tables.table(summary.xs(name, level="tested"), columns) for name in (FIRST, SECOND)}
tables.shown(split[FIRST], f"On {tables.title(FIRST)}", MARKED)

# %% tags=["hide-input"]
tables.shown(split[SECOND], f"On {tables.title(SECOND)}", MARKED)

# %% [markdown]
# The *ensemble of logits* runs both networks, each under its own statistics, and adds their logits: it is what a sum
# would do whose weights don't interfere and whose statistics are those of its networks; a sum under disjoint keys is
# just that. *Confidence* is the mean largest probability that the network of the other task gives; 10 % would be
# perfectly quiet.
#
# ## Every batch-norm policy
#
# | Policy | Where the sum's statistics come from, and what that presumes |
# |---|---|
# | `by_owner` | for each channel images of the task whose network has it, of both where both have: images sorted by task, and keys |
# | `union` | unlabelled training images of both tasks together; no task label at test time |
# | `summed` | the two networks' statistics added, as state dicts are: no images; wrong wherever they share a channel |
# | `per_task` | training images of the tested task: presumes to know which task an image is from |
# | `batch` | the test batch's own: presumes many test images of one task at once |
# | `own` | of networks alone and ensembles: training images of each network's own task |
#
# The headline is `summed` for disjoint keys, `by_owner` for random ones, and `union` for dense networks. One draw of
# the keys, but all of the profile under the headline's policy.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two tables of colours, MNIST and SVHN: test accuracy of the sum in percent for every method, in rows, and every batch-norm policy, in columns."}}
policies = tables.summarize(every_policy, ["method", "policy", "tested"])
apart = [m for m in levels["method"].unique() if p.method(m).keys == "none" and p.method(m).start == "random"]
most = policies.loc[apart, "after"].map(lambda cell: cell.mean).groupby(["method", "policy"]).min().max()
plots.policies(
    {f"the sum on {tables.title(n)} (%)": policies["after"].xs(n, level="tested") for n in (FIRST, SECOND)},
    list(measure.POLICIES),
    f"Whatever its statistics, no dense sum of networks that started apart reads more than {most:.0f} % of both tasks",
)

# %% tags=["hide-input", "hide-output"]
policy_table = tables.table(policies, ["before", "after"])
tables.shown(policy_table)

# %% [markdown]
# ## As others merge, and networks that did meet
#
# Two networks that were trained apart (`independent`), from a `shared start`, or by the recipe (`random keys`, here
# without their keys: as they are), merged by the methods of the literature. Statistics: `union`; of the ensemble `own`;
# of *random signs*, which are told which task a test image is from, `per_task`. Where a way has coefficients,
# validation images choose. Task arithmetic, TIES, Fisher averaging and RegMean are made for networks fine-tuned from one
# *pretrained* model; here there is none, so what they read here says little of them there. *Random weights of the
# partner's norms* stand in for each network in turn, as a control. The
# Fisher information is of up to 200 images a network.
#
# The last rows did meet, in training on both tasks: one network for all images (statistics: its `own`); a pair whose
# third term keeps both tasks; and one set of weights that is one task's network as it is, and the other's under random
# signs of each layer's inputs (Cheung et al. 2019), each with biases and batch norm of its own; it is told the task.
# (`quick` has neither these rows nor the ways that take long.)

# %% tags=["hide-input"]
ceilings = measure.frame(study, measure.ceilings(study, FIRST, SECOND))
ceilings["task"] = "trained on both tasks"
merged = tables.wide(pd.concat([beside.mergers(study, FIRST, SECOND), ceilings]))
merged = merged.rename_axis(index={"task": "networks"})
merged_table = tables.table(tables.summarize(merged, ["networks", "method", "tested"]), ["after"])
merged_table = merged_table.rename(columns=lambda heading: heading.replace(": after the sum", ""))
tables.shown(merged_table)

# %% [markdown]
# ## Where the sum lies
#
# The plane α·θ_m + β·θ_s on validation images, statistics from training images of the tested task. The star is the
# plain sum, the circles are the two networks alone.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Heat maps of validation accuracy over the two coefficients, one row for each method, one column for each task; a star marks the plain sum, circles the two networks alone."}}
planes = {m: measure.plane(study, m, FIRST, SECOND, strangers=True) for m in (TRAINED, DISJOINT)}
plots.plane(planes, (FIRST, SECOND), "The plain sum (star) and two networks that never met (circles), seed 0")

# %% [markdown]
# ## What the stand-ins are worth
#
# Where a dataset can't be had, the study takes a synthetic stand-in for it. This is what a small network (`keys alone`)
# that was trained on the stand-in alone reads of the images that stand above, and of the stand-in's own; one seed.
# Where the images above are a stand-in too, both are the same and say nothing of real ones. Batch-norm statistics: of
# the stand-in's training images (`own`), or of those of the tested task (`per_task`).

# %% tags=["hide-input"]
of_standins = tables.wide(measure.frame(study, measure.standin_worth(study, (FIRST, SECOND))))
worth = tables.summarize(of_standins, ["policy", "tested"])
worth_table = tables.table(worth, ["after"]).rename(columns=lambda heading: heading.replace(": after the sum", ""))
tables.shown(worth_table)

# %% [markdown]
# ## Finding

# %% tags=["hide-input"]
tables.save(
    NOTEBOOK,
    study,
    {
        "finding": finding,
        **{f"explained.{params.slug(m)}": value for m, value in at_fc2.items()},
        **{f"standin.{name}": worth.loc[(measure.OWN, name), "after"].mean for name in (FIRST, SECOND)},
    },
    {
        **of_task,
        **{f"split_{name}": found for name, found in split.items()},
        "policies": policy_table,
        "merged": merged_table,
        "standins": worth_table,
    },
    tables.headline(summary.loc[HEADLINE], "Task 3"),
    tables.intervals_of(summary),
    sums,
)
Markdown(finding)
