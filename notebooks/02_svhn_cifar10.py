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
# # Task 2: SVHN with CIFAR-10 as support
#
# The same as task 1 with SVHN, coloured house numbers, in MNIST's place: a harder main task, closer to the photographs
# of the support task. Every call is that of task 1 with another name.

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

NOTEBOOK = "02_svhn_cifar10"
MAIN, SUPPORT = "svhn", "cifar10"  # the datasets of θ_main and θ_support
BASELINE, TRAINED = params.BASELINE, params.TRAINED  # the rows that the finding compares

p = params.from_notebook(globals())  # to explore the networks that `make all` trained: params.read("quick")
study = Study(p)
plots.use_style()
main_title, support_title = params.DATASETS[MAIN], params.DATASETS[SUPPORT]
evaluate.train_pairs(study, MAIN, SUPPORT)
Markdown(results.data_notice(study.describe_data()))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Ten example images of each dataset on this page, one of each class, in rows; stand-ins are marked."}}
plots.examples([study.dataset(MAIN), study.dataset(SUPPORT)], "What the networks see: a test image of each class")

# %% [markdown]
# ## Before and after the sum
#
# Each row is one way to make the pair. *Before* is θ_main alone on SVHN, *after* is the network with the
# weights θ_main + θ_support, on the same test images. Both have their batch-norm statistics re-estimated on the
# same unlabelled training images of SVHN (policy `recalibrated`).

# %% tags=["hide-input"]
rows = results.with_gap(evaluate.before_after(study, MAIN, SUPPORT))
summary = results.summarize(rows, ["method"], ["before", "after", "gap", "kept"])
by_method = {row["method"]: row for row in summary}
difference = results.paired_difference(rows, TRAINED, BASELINE, "after")
MARGINS = {"before": 1.0, "support_before": 3.0}  # points that a network may be worse than alone, and still count
counted = results.counts(rows, TRAINED, BASELINE, MARGINS)
finding = results.finding(by_method[BASELINE], by_method[TRAINED], difference, counted, main_title)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy on the main task before and after the sum, one line for each method; the dotted line is chance. The table below holds the same numbers."}}
trained, baseline = by_method[TRAINED], by_method[BASELINE]
plots.before_after(
    summary,
    f"{main_title} after the sum: {trained['after']['mean']:.1f} % trained together, "
    f"{baseline['after']['mean']:.1f} % trained apart",
    main_title,
)

# %% tags=["hide-input"]
before_after_table = results.table(
    summary,
    {
        "method": "Method",
        "before": "Before the sum (%)",
        "after": "After the sum (%)",
        "gap": "Gap (points)",
        "kept": "Kept (%)",
        "n": "n",
    },
)
before_after_table.style.hide(axis="index")

# %% [markdown]
# `sequential` changes the summed weights, so its network is no longer θ_main + θ_support. Its two other rows are the
# controls: as many fine-tuning steps from θ_main, and from random weights. Where random weights do as well, the sum
# has contributed nothing.

# %% [markdown]
# ## What the support network pays, and the control
#
# A small gap is worth nothing if θ_support was sacrificed for it, or if θ_support could do SVHN anyway.
# So here is θ_support on its own task, beside a network trained alone for as many steps (`independent`), and
# θ_support on SVHN. A method *counts* if neither of its networks is worse before the sum than the one trained
# alone by more than 1 point (CIFAR-10: 3 points). Under a key that is a network of the key's size (`keys alone`).

# %% tags=["hide-input"]
support = results.summarize(rows, ["method"], ["support_before", "support_after", "support_on_main"])
support = [row for row in support if row["support_before"]]  # sequential pairs are those of `independent`
for row in support:
    twin = evaluate.same_size_alone(study, row["method"])
    row["counts"] = "yes" if results.counts(rows, row["method"], twin, MARGINS) else "no"
support_table = results.table(
    support,
    {
        "method": "Method",
        "support_before": f"θ_support on {support_title} (%)",
        "support_after": f"the sum on {support_title} (%)",
        "support_on_main": f"control: θ_support on {main_title} (%)",
        "counts": "Counts",
        "n": "n",
    },
)
support_table.style.hide(axis="index")

# %% [markdown]
# ## Every batch-norm policy
#
# The same sums with other statistics: `union` uses training images of both tasks, `summed` adds the two networks'
# statistics as a sum of state dicts does, `batch` uses the test batch's own, and `owner`, for disjoint keys only, leaves
# each channel its owner's. The headline is `per_task`, which is what `recalibrated` means for one tested task.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Table of colours: test accuracy of the sum on the main task in percent for every method, in rows, and every batch-norm policy, in columns."}}
policy_rows = evaluate.pair_policies(study, MAIN, SUPPORT)
policy_summary = results.summarize(policy_rows, ["method", "policy"], ["before", "after"])
plots.policies(
    policy_summary,
    {"before": f"θ_main alone on {main_title} (%)", "after": f"the sum on {main_title} (%)"},
    list(evaluate.POLICIES),
    "θ_main and the sum under every batch-norm policy",
)

# %% [markdown]
# ## How training went

# %% tags=["hide-input"] mystnb={"image": {"alt": "Training losses above and validation accuracies below, against the epoch, one column for each method: main network, sum and support network."}}
shown = [m for m in p.methods if p.method(m).protocol == "joint"]
histories = {m: study.run(evaluate.pair_configs(study, m, MAIN, SUPPORT, 0)["pair"]).history for m in shown}
last = histories[TRAINED][-1]
plots.curves(
    histories,
    f"Under “{TRAINED}” the sum ends at {last['val_sum']:.1f} % and θ_main at {last['val_main']:.1f} % of the "
    "validation images (seed 0)",
    main_title,
    support_title,
)

# %% [markdown]
# The curves use the validation split and the running batch-norm statistics of training; seed 0.
#
# ## Is it only the norm?
#
# Batch norm hides the scale of a layer's weights, so θ_main could survive the sum by simply being larger. A norm
# ratio near 1 rules that out. The cosine tells whether the two networks have become copies (1) or are unrelated (0).

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: ratio of the weight norms of the two networks for each layer, on a logarithmic axis. Right: cosine between their weights. One line for each method."}}
layer_rows = evaluate.layer_rows(study, MAIN, SUPPORT)
of_trained = [row for row in layer_rows if row["method"] == TRAINED]
ratios = [row["norm_ratio"] for row in of_trained]
plots.layers(layer_rows, f"{TRAINED}: norm ratios between {min(ratios):.2f} and {max(ratios):.2f}; seed 0")

# %% tags=["hide-input"]
layer_table = results.layer_table(layer_rows)
layer_table.style.hide(axis="index")

# %% [markdown]
# ## Where the sum lies
#
# The plane α·θ_main + β·θ_support, on validation images. The star is the plain sum (1, 1); the circles are the two
# networks alone. Each point has its statistics re-estimated on training images of the tested task.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Heat maps of validation accuracy over the two coefficients, one row for each method, one column for each task; a star marks the plain sum, circles the two networks alone."}}
planes = {m: evaluate.coefficient_plane(study, m, MAIN, SUPPORT) for m in (BASELINE, TRAINED)}
plots.plane(
    planes,
    {MAIN: main_title, SUPPORT: support_title},
    "The plain sum (star) between the two networks (circles), seed 0",
)

# %% [markdown]
# ## Finding

# %% tags=["hide-input"]
controls = {row["method"]: row["support_on_main"] for row in support}
results.save(
    NOTEBOOK,
    study,
    {
        "finding": finding,
        **results.values_of(summary, ["before", "after", "gap", "kept"]),
        **results.values_of(support, ["support_before", "support_after", "support_on_main"]),
        "norm_ratio.min": min(ratios),
        "norm_ratio.max": max(ratios),
    },
    {
        "before_after": before_after_table,
        "policies": results.table(
            policy_summary,
            {"method": "Method", "policy": "Policy", "before": "Before (%)", "after": "After (%)", "n": "n"},
        ),
        "support": support_table,
        "layers": layer_table,
    },
    [
        results.headline_row(row, "Task 2: SVHN", "θ of SVHN + θ of CIFAR-10", controls[row["method"]])
        for row in (baseline, trained)
    ],
)
Markdown(finding)
