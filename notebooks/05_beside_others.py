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
# # Beside others
#
# After the benchmark of *ZipIt!* (Stoica et al. 2024, who draw several halves at random): a dataset is cut into its
# classes 0 to 4 and 5 to 9, two networks are trained, each on its half alone, and made into one that has to tell all
# ten classes. Nobody says which half a test image is from. It is one cut: intervals are over networks only. All
# networks are of one size, that of the keyed ones; not every way is tried on each, nor has every profile all of them:
# those *trained plainly* (`keys alone`), those that are `quiet alone` on the other half's images as in the nearest work
# (Caso et al. 2026), also with nine tenths of their weights pruned from a shared start, those trained plainly from a
# shared start (the same random weights), and this study's, which are only added or run side by side. These were trained
# beside a network that learns the other half (*seen*: its images, and through the loss of the sum its labels, which is
# outside the benchmark), or beside one of another dataset (*unseen*: what a network says to classes that it never saw
# is then an open-set problem). Task arithmetic and TIES, as Fisher averaging and RegMean, are made for networks
# fine-tuned from one *pretrained* model; here there is none, so what they read here says little of them there. [Does it
# need a VGG?](residual_05) shows the same on a ResNet-20, [Does depth change it?](deep_05) on VGG16.

# %% tags=["parameters", "remove-cell"]
# Every knob has the value of params/<profile>.yaml. Add lines such as `seeds = 3` to change some; `make` and
# `papermill -f params/quick.yaml` inject theirs below.
profile = "smoke"

# %% tags=["hide-input"]
from IPython.display import Markdown

from weightsum_lib.report import findings, plots, tables
from weightsum_lib.study import beside, params
from weightsum_lib.study.params import ALONE, DISJOINT, RANDOM
from weightsum_lib.study.runs import Study

NOTEBOOK = "05_beside_others"
ALL = "all ten classes"

p = params.from_notebook(globals())  # to explore the networks that `make all` trained: params.read("quick")
of_ours = DISJOINT in p.merged  # else its sums are of networks that were trained plainly
SUM = ("sum under disjoint keys", f"{DISJOINT}, unseen") if of_ours else ("sum under random keys", ALONE)
WHOSE = "of networks that have not seen the other half" if of_ours else "of plainly trained networks"
TARGETS = {  # what the sum is held against, and by how many points it should be above, at least
    "ZipIt! on the first ⅔ of the layers of plainly trained networks": ((beside.PART, ALONE), 0),
    "the logits of two plainly trained networks added": ((beside.ENSEMBLE, ALONE), -1),
}
study = Study(p)
plots.use_style()
found = beside.frame(study).rename(columns={"network": "way", "method": "networks", "accuracy": "after"})
found["tested"] = found["tested"].str.partition(" ")[2].replace("", ALL)
found = found.set_index(["task", "way", "networks", "tested", "seed"])
summary = tables.summarize(found[["after", "weights"]], ["task", "way", "networks", "tested"]).loc[p.halves]
of_all = summary.xs(ALL, level="tested")
after, way = of_all["after"], of_all.index.get_level_values("way")
by_seed = found["after"].groupby(found.index.names, sort=False).mean().xs(ALL, level="tested").unstack("seed")
no_merger = way.str.contains("^sum|^ensemble|told") | (way == beside.ONE)
of_others, finding = after[~no_merger].map(lambda cell: cell.mean), ""
for halved in p.halves:
    finding += f"{tables.title(halved)}: the {SUM[0]} {WHOSE} reads {after[(halved, *SUM)]} % of all ten classes"
    for words, (other, least) in TARGETS.items():
        points = tables.interval(by_seed.loc[(halved, *SUM)] - by_seed.loc[(halved, *other)])
        target = f"the target, {least} or more, is {findings.judge(points, least)}".replace("-", "−")
        finding += f", {points} points over {words} ({target})"
    if RANDOM in p.merged:
        recipe, plain = ((halved, "sum under random keys", networks) for networks in (f"{RANDOM}, unseen", ALONE))
        points = tables.interval(by_seed.loc[recipe] - by_seed.loc[plain])
        finding += f". Under random keys the sum of networks trained by the recipe, unseen, reads {after[recipe]} %, "
        finding += f"that of plainly trained ones {after[plain]} %: {points} points (seeds of both: {points.n})"
    ensembles = after.xs(halved).xs(beside.ENSEMBLE).map(lambda cell: cell.mean)
    unseen = ensembles[~ensembles.index.str.endswith(", seen")]
    most = of_others[halved].idxmax(), unseen.idxmax()
    merger, ensemble = after[(halved, *most[0])], after[(halved, beside.ENSEMBLE, most[1])]
    finding += f". The best ensemble is that of {most[1]}: {ensemble} % (n = {ensemble.n}); of the literature's "
    finding += "mergers {} ({}) reads most, ".format(*most[0]) + f"{merger} % (n = {merger.n}); one of these two "
    finding += f"networks alone, the better one, {after[(halved, beside.ONE, most[0][1])]} %.\n\n"
Markdown(f"**The finding.** {finding}{tables.data_notice(study.describe_data())}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy over all ten classes for every way to make one network of two, a line a way, a marker for each pair of networks, this study's in orange; a panel for each dataset that is halved; the dashed line is the best ensemble. The table below holds the numbers."}}
each = []
for halved in p.halves:
    merger, networks = of_others[halved].idxmax()
    others = (merger, networks), (beside.ENSEMBLE, ALONE), (beside.ONE, networks)
    reads = [f"{after[(halved, *other)].mean:.1f}" for other in (SUM, *others)]
    words = "{} % of {} ({}: {}, plain networks' ensemble: {}, one network: {})"
    each.append(words.format(reads[0], tables.title(halved), merger, *reads[1:]))
plots.merged(of_all, {beside.PUBLISHED_NETWORK: beside.PUBLISHED}, f"The {SUM[0]} reads {', '.join(each)}")

# %% [markdown]
# The dashed line is the ceiling: the best ensemble of logits, which runs both networks, of networks that have not *seen*
# the other half. On top stands what is had without any merger: *one of the two, alone*, the one that validation images
# choose. It was trained for five classes of ten (a *seen* one may know a little of the others), so what reads no more
# may have kept one network and lost the other (the table says what is read of each half). *Random signs* are told which
# half a test image is from, which nobody else is. Statistics of batch norm are those of unlabelled training images of
# both halves (`union`), under random keys of each channel's owner (`by_owner`), in an ensemble and of one network alone
# those of each network's own half (`own`); disjoint keys need no images (`summed`): their sum is the ensemble of its
# two networks, but for statistics that are those of training. Where a way has coefficients (α and β of ZipIt!, λ of
# Fisher, which weighs the network of classes 0-4, the scale of task arithmetic and TIES), validation images choose, for
# each pair anew (column *Chosen*; a half is the average). Where they choose a λ of 0.1 or 0.9, Fisher averaging has given
# up one of the two networks. The Fisher information is of up to 200 images a network.
#
# Sizes are fair where the *merged* networks are of one size: a column counts the weights of the one network that
# are not zero, as a multiple of one of the two. An averaged network has one network's, that of a pruned pair too, since
# from a shared start the zeros coincide; where channels are matched by activations, zipped or regressed (RegMean), its
# zeros fill up. A zipped one of unpruned networks has as many or fewer, since a channel that is merged within one
# network has no weight to one that is merged within the other: the authors' two pairs of α and β, which are tried,
# leave about all, and no bounds (α = β = 1), which is tried too, about half. A sum under keys or one that is zipped in
# part has up to two, an ensemble two: hold a sum against the best ensemble, whichever networks that is of. Not zero is
# not dense: written out, a sum under random keys has up to four times one network's weights.
#
# Grey marks, where CIFAR-10 is halved, are published, not measured here (Stoica et al. 2024, Table 1): ResNet-20 at
# four times the width, whose targets are the classes' names in CLIP's text space. There ZipIt! in part comes within 4
# points of its ensemble: wider networks that are trained longer are easier to match, so what small networks say of it
# need not hold for those. Of the nearest work (Caso et al. 2026) there is no such number: it adds pairs of networks,
# each for one of MNIST's classes, which read 98.4 to 99.1 %; on CIFAR-10 its sums of weights fail, and sums of logits
# work.

# %% tags=["hide-input"]
table = tables.table(summary, ["after"]).rename(columns=lambda heading: heading.replace(": after the sum", ""))
table["Weights, × one network's"] = [f"{cell.mean:.2f}" for cell in summary.xs(ALL, level="tested")["weights"]]
by_pair = found["chosen"].xs(ALL, level="tested").groupby(["task", "way", "networks"]).unique()
table["Chosen"] = ["; ".join(by_pair[pair]) or "–" for pair in of_all.index]
assert list(table["Way"]) == list(way)  # line by line
table["Task"] = table["Task"].map(tables.title)
tables.shown(table, marked=["sum under random keys", "sum under disjoint keys"])

# %% [markdown]
# ## Finding
#
# For the sum under disjoint keys of networks that have not seen the other half (in a profile without them, as `quick`,
# that of plainly trained ones under random keys): does it read more than what ZipIt! makes of the first layers of
# networks trained plainly, and no more than a point less than the ensemble of these networks' logits? A target is
# reached or missed if the whole 95 % interval over seeds says so, else undecided; one seed decides nothing.

# %% tags=["hide-input"]
intervals = {".".join(map(params.slug, at)): cell for at, cell in after.items()}
tables.save(NOTEBOOK, study, {"finding": finding}, {"merged": table}, intervals=intervals)
Markdown(finding)
