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
# # Task 1: MNIST with CIFAR-10 as support
#
# The question as it was asked: train θ_m on MNIST and θ_c on CIFAR-10, two networks of one architecture, so that the
# network with the weights θ_m + θ_c does on MNIST what θ_m does alone. CIFAR-10 is there only to make θ_m survive a
# sum; below, θ_m is θ_main and θ_c is θ_support. This notebook compares two networks that never met (`independent`),
# the asker's sketch (`sequential`: sum them, then fine-tune the sum), and readings of the third term (`joint`). Further
# rows, in profiles that have them, are networks from one start (`shared start`) and layers held at equal norms; and
# small networks under keys (task 3): a pair under `random keys` shares half of its channels here (k = ½), with a
# stranger in task 3 far fewer (⅛).

# %% tags=["parameters", "remove-cell"]
# Every knob has the value of params/<profile>.yaml. Add lines such as `seeds = 3` to change some; `make` and
# `papermill -f params/quick.yaml` inject theirs below.
profile = "smoke"

# %% tags=["remove-cell"]
import pandas as pd
from IPython.display import Markdown

from weightsum_lib.report import findings, plots, tables
from weightsum_lib.study import measure, params
from weightsum_lib.study.params import BASELINE, TRAINED  # the rows that the finding compares
from weightsum_lib.study.runs import Study

# %% tags=["remove-cell"]
NOTEBOOK, TASK = "01_mnist_cifar10", 1
MAIN, SUPPORT = "mnist", "cifar10"  # the datasets of θ_main and θ_support

# %% tags=["hide-input"]
p = params.from_notebook(globals())  # to explore the networks that `make all` trained: params.read("quick")
study = Study(p)
plots.use_style()
main_title, support_title = tables.title(MAIN), tables.title(SUPPORT)
every_policy = tables.wide(measure.frame(study, measure.pairs(study, MAIN, SUPPORT)))
sums = every_policy.xs("per_task", level="policy")
summary = tables.summarize(sums, ["method", "tested"])
on_main, on_support = (summary.xs(name, level="tested") for name in (MAIN, SUPPORT))
MARGINS = {MAIN: 1.0, SUPPORT: 3.0}  # points that a network may be worse than alone, and still count
counted = findings.counts(sums, TRAINED, BASELINE, MARGINS)
finding = findings.of_pair(on_main, sums.xs(MAIN, level="tested"), counted, main_title)
Markdown(f"**The finding.** {finding}\n\n{tables.data_notice(study.describe_data())}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Ten example images of each dataset on this page, one of each class, in rows; stand-ins are marked."}}
shown = [study.dataset(MAIN), study.dataset(SUPPORT)]
plots.examples(shown, "What the networks see: a test image of each class", p.in_channels)

# %% [markdown]
# ## Before and after the sum
#
# Each row is one way to make the pair. *Before* is θ_main alone on MNIST, *after* is the network with the
# weights θ_main + θ_support, on the same test images. Both have their batch-norm statistics re-estimated on the
# same unlabelled training images of MNIST (policy `per_task`). The control is θ_support on MNIST, under
# statistics of its own task.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy on the main task before and after the sum, and of the support network there, one line for each method; the dotted line is chance. The table below holds the same numbers."}}
after = on_main["after"]
message = f"{main_title} after the sum: {after[TRAINED].mean:.1f} % together, {after[BASELINE].mean:.1f} % apart"
plots.before_after(summary.xs(MAIN, level="tested", drop_level=False), message)

# %% tags=["hide-input"]
main_table = tables.table(on_main, ["before", "after", "gap", "kept", "other"])
tables.shown(main_table, marked=[BASELINE, TRAINED])

# %% [markdown]
# In brackets, here and on all pages, stands the 95 % interval over n seeds; one seed has none. *Kept* is after over
# before, of which chance alone keeps about a tenth.
#
# `sequential` changes the summed weights, so its network is no longer θ_main + θ_support. Its two other rows are the
# controls: as many fine-tuning steps from θ_main, and from random weights. Where random weights do as well, the sum
# has contributed nothing.
#
# ## Which third term?
#
# The other readings of the third term (in profiles that have them), held against `joint ce` seed by seed: how many
# points more (−: less) θ_main reads alone, and how many the sum. Where θ_main's own answers have a part in the third
# term (`signed_gap`, the letter of the question, `loss_gap`, `logit_difference`; `distill` holds them fixed) a gap can
# also be closed from above, by making θ_main worse.

# %% tags=["hide-input"]
readings = [m for m in p.rows if p.method(m).third not in ("none", p.method(TRAINED).third)]
on = sums.xs(MAIN, level="tested")
against = [[m, *(f"{tables.paired(on, m, TRAINED, end):.2f}" for end in ("before", "after"))] for m in readings]
columns = ["Method", f"θ_main alone, against {TRAINED} (points)", f"The sum, against {TRAINED} (points)"]
reading_table = pd.DataFrame(against, columns=columns)
tables.shown(reading_table) if readings else Markdown("This profile has no other.")

# %% [markdown]
# ## What the support network pays
#
# A small gap is worth nothing if θ_support was sacrificed for it, or if θ_support could do MNIST anyway (the control
# above). So here is θ_support on its own task, and the sum there. A method *counts* if neither of its networks is worse
# before the sum than one of its size that was trained alone for as many steps, by more than 1 point (CIFAR-10:
# 3 points): yes or no where the whole interval of the paired difference says so, else undecided, as all is with one
# seed; `independent`, of whatever width, is its own measure. The control here is θ_main on CIFAR-10.

# %% tags=["hide-input"]
pairs = on_support.loc[[m for m in on_support.index if m in p.rows]]  # sequential ones are those of `independent`
pairs = pairs.assign(counts=[findings.counts(sums, m, p.twin(m), MARGINS) for m in pairs.index])
support_table = tables.table(pairs, ["before", "after", "other", "counts"])
tables.shown(support_table, marked=[BASELINE, TRAINED])

# %% [markdown]
# ## Every batch-norm policy
#
# The same sums with other statistics: `union` uses training images of both tasks, `summed` adds the two networks'
# statistics as a sum of state dicts does, `batch` uses the test batch's own, and `by_owner`, under keys only, gives
# each channel those of training images of the task whose network has it.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Table of colours: test accuracy of the sum on the main task in percent for every method, in rows, and every batch-norm policy, in columns."}}
policies = tables.summarize(every_policy, ["method", "policy", "tested"]).loc[list(pairs.index)]
panels = {f"the sum on {tables.title(n)} (%)": policies["after"].xs(n, level="tested") for n in (MAIN, SUPPORT)}
by_policy = policies["after"].loc[TRAINED].xs(MAIN, level="tested").map("{0.mean:.0f} %".format)
message = "The sum of {} reads {per_task} of {} with statistics of its images, {summed} with the two networks' added"
plots.policies(panels, list(measure.POLICIES), message.format(TRAINED, main_title, **by_policy))

# %% [markdown]
# ## How training went

# %% tags=["hide-input"] mystnb={"image": {"alt": "Training losses to the left and validation accuracies to the right, against the epoch, one row for each method: main network, sum and support network."}}
histories = measure.histories(study, MAIN, SUPPORT)
last = histories[TRAINED][-1]
ends = f"the sum ends at {last['val_sum']:.1f} % and θ_main at {last['val_main']:.1f} % of the validation images"
plots.curves(histories, main_title, support_title, f"Under “{TRAINED}” {ends} (seed 0)")

# %% [markdown]
# Accuracies are of the validation split, of networks alone under the running batch-norm statistics of training, of the
# sum under statistics re-estimated on 500 training images of the tested task; seed 0. Where keys are used the third
# term is of both tasks' images, added.
#
# ## Is it only the norm?
#
# Batch norm hides the scale of a layer's weights, so θ_main could survive the sum by simply being larger: the norm
# ratio tells. The cosine tells whether the two networks have become copies (1) or are unrelated (0). Equal norms
# don't mean that both count equally in the sum, so the last panel shows how much of what happens there, on the main
# task's images, θ_main alone explains (the squared correlation of each channel with the same one of θ_main, weighted
# by variance).

# %% tags=["hide-input"] mystnb={"image": {"alt": "Top: ratio of the weight norms of the two networks for each layer, on a logarithmic axis. Middle: cosine between their weights. Bottom: variance inside the sum that the main network explains. One line for each method."}}
layers = measure.layers(study, MAIN, SUPPORT)
explained = pd.concat([measure.explained(study, m, MAIN, SUPPORT, strangers=False) for m in (BASELINE, TRAINED)])
ratios = layers["norm_ratio"][layers["method"] == TRAINED]
plots.layers(layers, explained, f"{TRAINED}: norm ratios between {ratios.min():.2f} and {ratios.max():.2f}; seed 0")

# %% tags=["hide-input"]
layer_table = tables.layer_table(layers)
tables.shown(layer_table, marked=[TRAINED])

# %% [markdown]
# ## Where the sum lies
#
# The plane α·θ_main + β·θ_support, on validation images. The star is the plain sum (1, 1); the circles are the two
# networks alone. Each point has its statistics re-estimated on training images of the tested task.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Heat maps of validation accuracy over the two coefficients, one row for each method, one column for each task; a star marks the plain sum, circles the two networks alone."}}
planes = {m: measure.plane(study, m, MAIN, SUPPORT) for m in (BASELINE, TRAINED)}
plots.plane(planes, (MAIN, SUPPORT), "The plain sum (star) and the two networks (circles), seed 0")

# %% [markdown]
# ## Finding

# %% tags=["hide-input"]
tables.save(
    NOTEBOOK,
    study,
    {
        "finding": finding,
        "norm_ratio.min": min(ratios),
        "norm_ratio.max": max(ratios),
    },
    {
        "before_after": main_table,
        "readings": reading_table,
        "support": support_table,
        "policies": tables.table(policies, ["before", "after"]),
        "layers": layer_table,
    },
    tables.headline(summary.loc[[(m, MAIN) for m in (BASELINE, TRAINED)]], f"Task {TASK}"),
    tables.intervals_of(summary),
    sums,
)
Markdown(finding)
