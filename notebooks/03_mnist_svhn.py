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
plane_points = 4
seeds = 1
methods = {
    "independent": {"protocol": "independent"},
    "sequential": {"protocol": "sequential"},
    "joint ce": {"protocol": "joint", "third": "ce"},
    "joint loss_gap": {"protocol": "joint", "third": "loss_gap"},
    "joint distill": {"protocol": "joint", "third": "distill"},
}
allow_standin = ["mnist", "cifar10", "svhn"]
data_dir = ""
results_dir = "results"
device = "auto"

# %% tags=["hide-input"]
from IPython.display import Markdown

from weightsum_lib import evaluate, params, plots, results
from weightsum_lib.study import Study

NOTEBOOK = "03_mnist_svhn"
FIRST, SECOND, SUPPORT = "mnist", "svhn", "cifar10"
BASELINE, TRAINED = params.BASELINE, params.TRAINED  # the rows that the finding compares

p = params.from_notebook(globals())  # to explore the networks that `make all` trained: params.read("quick")
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
# network alone as for the sum: nobody tells the network which task an image is from. The green diamond is the
# control without which no number here means anything: the *other* task's network on these images, alone.
# `sequential` is not here, its pair before fine-tuning is that of `independent`.

# %%
for name in (FIRST, SECOND):
    rows = results.with_gap(rows, f"before_{name}", f"after_{name}", suffix=f"_{name}")
columns = [f"{kind}_{name}" for name in (FIRST, SECOND) for kind in ("before", "after", "gap", "kept", "other")]
union = results.summarize([row for row in rows if row["policy"] == "union"], ["method"], columns)
per_task = results.summarize([row for row in rows if row["policy"] == "per_task"], ["method"], columns)
by_method = {row["method"]: row for row in union}
margins = {f"before_{name}": 1.0 for name in titles}  # points that a network may be worse than alone, and still count
counted = results.counts([row for row in rows if row["policy"] == "union"], TRAINED, BASELINE, margins)
finding = results.finding_unmet(by_method[BASELINE], by_method[TRAINED], counted, titles)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, MNIST and SVHN. In each, for every method, test accuracy of the task's own network, of the sum, and of the other task's network as a control; the dotted line is chance. The table below holds the same numbers."}}
trained, baseline = by_method[TRAINED], by_method[BASELINE]
plots.unmet(
    union,
    FIRST,
    SECOND,
    titles,
    f"Never met, {TRAINED}: the sum reads {trained[f'after_{FIRST}']['mean']:.1f} % of {titles[FIRST]} and "
    f"{trained[f'after_{SECOND}']['mean']:.1f} % of {titles[SECOND]}",
)

# %% tags=["hide-input"]
union_table = results.unmet_table(union, titles)
union_table.style.hide(axis="index")

# %% [markdown]
# ## If the task were known
#
# The same sums with statistics from training images of the tested task alone (policy `per_task`). That presumes to know
# at test time which task an image is from; it is here to show how much of the loss is the statistics'.

# %% tags=["hide-input"]
per_task_table = results.unmet_table(per_task, titles)
per_task_table.style.hide(axis="index")

# %% [markdown]
# ## Where the sum lies
#
# The plane α·θ_m + β·θ_s on validation images, statistics from training images of the tested task. The star is the
# plain sum, the circles are the two networks alone.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Heat maps of validation accuracy over the two coefficients, one row for each method, one column for each task; a star marks the plain sum, circles the two networks alone."}}
planes = {m: evaluate.coefficient_plane(study, m, FIRST, SECOND, SUPPORT) for m in (BASELINE, TRAINED)}
plots.plane(planes, titles, "The plain sum (star) of two networks that never met (circles), seed 0")

# %% [markdown]
# ## Finding

# %% tags=["hide-input"]
results.save(
    NOTEBOOK,
    study,
    {
        "finding": finding,
        **results.values_of(union, columns),
        **results.values_of(per_task, columns, prefix="per_task."),
    },
    {"union": union_table, "per_task": per_task_table},
    [
        results.headline_row(
            row, f"Task 3: {titles[name]}", "θ of MNIST + θ of SVHN", row[f"other_{name}"], suffix=f"_{name}"
        )
        for name in (FIRST, SECOND)
        for row in (baseline, trained)
    ],
)
Markdown(finding)
