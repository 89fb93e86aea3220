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
# # How do I sum two networks' weights?
#
# The question as it was posted, in short: *one VGG16-like network is trained on MNIST, one of the same architecture on
# CIFAR-10; a third, `modelcombo`, has the sum of their weights, layer by layer, and is trained some more on MNIST. The
# loss is CE(MNIST) + CE(CIFAR-10) + a third term, "CrossEntropy([MNIST+CIFAR10] − MNIST)". Is this a good idea? Is it a
# multi-input network, or weight sharing? How do I sum the weights? Are there similar examples? I think of it as
# meta-learning.*
#
# | asked | answer | where |
# |---|---|---|
# | How do I sum the weights? | `WeightSum([a, b])`: the sum is computed in each forward pass, so gradients reach both | below |
# | What about batch norm? | γ and β are summed like all weights; running statistics are estimated anew, unless the networks share (almost) no channel | below |
# | Multi-input network or weight sharing? | neither: a third network whose weights are a *function* of two others | below |
# | What is the third term? | it has several readings; the simplest is the plain cross-entropy of the sum; profiles with more rows than `quick` hold the others against it (tasks 1 and 2) | table below |
# | Is it meta-learning? | a relative: it asks for weights that still work *after* a change of weights | below |
# | Is it a good idea? | for a pair trained together the sum keeps the task that the third term names, or most of it, and may lose the other; one network trained on both tasks is simpler, where both datasets can be had; two that never met and started apart lose most if they are added as they are, less if they are small and get room, least if they were trained for it too | tasks 1 to 3, next pages |
# | Similar examples? | model soups, task arithmetic, superposition of models and others | bibliography below |
#
# Everything here runs in seconds, on two untrained networks and a few images of the synthetic stand-in for SVHN; the
# next pages train networks.

# %%
import torch
import torch.nn.functional as F

from weightsum_lib import WeightSum, normalize, recalibrate, synthesize, three_term_loss, vgg8, vgg16

torch.manual_seed(0)
theta_m, theta_c = vgg8(width=1 / 16), vgg8(width=1 / 16)  # small: fast
images, labels = map(torch.from_numpy, synthesize("svhn", 64, "train"))
x = normalize(images)
x.shape, labels.shape

# %% [markdown]
# ## The obvious way loses the gradient
#
# Copying summed weights into a third network makes new leaf tensors. The third network can be trained, but what it
# learns never reaches θ_m or θ_c.

# %%
combo = vgg8(width=1 / 16)
of_c = theta_c.state_dict()
added = {name: w + of_c[name] for name, w in theta_m.state_dict().items()}
combo.load_state_dict(added)
F.cross_entropy(combo(x), labels).backward()
gradient = combo.features.conv1_1.weight.grad
print(f"gradient of combo: {gradient.norm():.3f}")
print(f"gradient of θ_m:   {theta_m.features.conv1_1.weight.grad}")

# %% [markdown]
# ## Summing so that gradients flow
#
# `WeightSum` adds the parents' parameters inside its forward pass (with `torch.func.functional_call`), so the sum is
# part of the graph. As ∂(θ_m + θ_c)/∂θ_m is the identity, both parents get the *same* gradient from the loss of the
# sum: that of the combined network.

# %%
total = WeightSum([theta_m, theta_c])
F.cross_entropy(total(x), labels).backward()
for name, p in theta_m.named_parameters():
    assert torch.equal(p.grad, theta_c.get_parameter(name).grad)
gradient = theta_m.features.conv1_1.weight.grad
print(f"gradient of θ_m: {gradient.norm():.3f}, and the same for θ_c")

# %% [markdown]
# With the two other terms, that is the whole training step of this study ([`three_term_loss`](../api.md)):

# %%
weights = [*theta_m.parameters(), *theta_c.parameters()]
optimizer = torch.optim.SGD(weights, lr=0.01)
optimizer.zero_grad()
x_m, y_m, x_c, y_c = x[:32], labels[:32], x[32:], labels[32:]
z_m, z_c, z_sum = theta_m(x_m), theta_c(x_c), total(x_m)
loss = three_term_loss(z_m, y_m, z_c, y_c, z_sum, third="ce")
loss.total.backward()
optimizer.step()
{name: round(value.item(), 3) for name, value in loss._asdict().items()}

# %% [markdown]
# ## Batch norm: sum the weights, not the statistics
#
# Running means and variances describe the activations of *one* network. Those of the sum are other activations, and
# the sum of two variances is not their variance. So the statistics of a sum are re-estimated from unlabelled images
# (as after SWA, Izmailov et al. 2018), for the network before the sum and after it alike. Exceptions are networks
# that share no channel (disjoint keys, [task 3](03_mnist_svhn)), or almost none (very sparse ones,
# [the recipe](04_what_transfers)): there each channel's statistics are its owner's, and
# adding them is right. Two scales γ near 1 add up to 2, so networks that are trained for keys store the deviation from 1.

# %%
for network in (theta_m, theta_c):
    recalibrate(network, x)
plain = total.materialize().eval()  # the sum as a plain network
recalibrate(plain, x)
networks = (theta_m, theta_c, plain)
of_m, of_c, of_sum = (n.features.bn2_1.running_var[0] for n in networks)
print(f"variance that the sum has, channel 0 of bn2_1: {of_sum:.2f}")
print(f"variance by adding the two networks' buffers:  {of_m + of_c:.2f}")

# %% [markdown]
# Batch norm also hides the *scale* of the layer before it. If ‖W_m‖ is much larger than ‖W_c‖, then W_m + W_c is nearly
# W_m, and the sum "works" for an empty reason. The pages of tasks 1 and 2 therefore show the norm ratio of every layer.
#
# ## Why the posted `VGG16COMBO` can't work
#
# In outline, and with its three faults kept:

# %%
from torch import nn


class Combo(nn.Module):
    """The posted idea in outline, with its faults."""

    def __init__(self, model1, model2):  # 1: they are never used
        super().__init__()
        convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(8, 10)

    def forward(self, x, z):
        x, z = self.body(x), self.body(z)  # 2: one set of weights
        both = x + z
        return self.classifier(both.view(m.size(0), -1))  # 3: there is no m


posted = Combo(theta_m, theta_c)
ids = {id(weight) for weight in weights}
taken = sum(id(p) in ids for p in posted.parameters())
print("parameters of θ_m or θ_c in it:", taken)
try:
    posted(x_m, x_c)
except NameError as error:
    print("NameError:", error)

# %% [markdown]
# 1. `model1` and `model2` are arguments that nothing reads: the new network starts from random weights.
# 2. The two inputs share one set of weights, and their *activations* are added. That is a siamese network, not a sum
#    of weights.
# 3. `m.size(0)` is a `NameError`: no `m` was ever defined.
#
# The network that was meant is one line, for any two networks of one architecture:

# %%
pair = [vgg16(in_channels=1, width=1 / 16) for _ in range(2)]
modelcombo = WeightSum(pair)
at_width_1 = sum(p.numel() for p in vgg16(in_channels=1).parameters())
print(tuple(modelcombo(x_m).shape), f"{at_width_1:,} parameters at width 1")

# %% [markdown]
# ## Multi-input network or weight sharing?
#
# Neither. A *multi-input* network takes several inputs in one forward pass; here each forward pass has one input.
# *Weight sharing* uses one tensor in several places; θ_m and θ_c share nothing. It is three networks, two of them
# free and the third's weights a fixed function of theirs, trained as multi-task learning with a constraint tying the
# weights.
#
# ## The readings of the third term
#
# With z_m = f(x_m; θ_m) and z_sum = f(x_m; θ_m + θ_c). The last columns are computed here, for the two networks above:
# the value, and how strongly the third term alone pulls at θ_m and at θ_c.

# %% tags=["hide-input"]
import pandas as pd

READINGS = {
    "ce": ("CE(z_sum, y)", "the sum must solve the task"),
    "signed_gap": ("CE(z_sum, y) − CE(z_m, y)", "the letter of the question; at weight 1 it cancels the first term"),
    "loss_gap": ("|CE(z_sum, y) − CE(z_m, y)|", "can also be met by making θ_m worse"),
    "distill": ("KL(softmax z_m ‖ softmax z_sum)", "the sum imitates θ_m (held fixed), right or wrong"),
    "logit_difference": ("CE(z_sum − z_m, y)", "the change of the logits must solve the task"),
}
rows = []
for third, (formula, remark) in READINGS.items():
    torch.manual_seed(0)  # dropout is the same for all
    value = three_term_loss(theta_m(x_m), y_m, theta_c(x_c), y_c, total(x_m), third=third).third
    pulls = [
        torch.autograd.grad(value, list(n.parameters()), retain_graph=True, allow_unused=True)
        for n in (theta_m, theta_c)
    ]
    norms = [sum(float(g.square().sum()) for g in gradient if g is not None) ** 0.5 for gradient in pulls]
    rows.append([third, formula, remark, f"{value:.3f}", f"{norms[0]:.2f}", f"{norms[1]:.2f}"])
columns = ["third", "formula", "remark", "value (nats)", "gradient at θ_m", "gradient at θ_c"]
pd.DataFrame(rows, columns=columns).style.hide(axis="index").set_properties(**{"text-align": "left"})

# %% [markdown]
# There is one more reading, as arithmetic on the *weights*: "[MNIST+CIFAR10] − MNIST". It is just the CIFAR-10 network
# again, so it would ask θ_c to solve MNIST, and no sum is left in it:

# %%
difference = WeightSum([total.materialize(), theta_m], [1, -1]).weights()
of_c = dict(theta_c.named_parameters())
max((w - of_c[name]).abs().max().item() for name, w in difference.items())

# %% [markdown]
# ## Is it meta-learning?
#
# It is a relative of it. MAML (Finn et al. 2017) looks for weights θ that work *after* a change of weights, θ − η∇L.
# Here θ_m has to work after the change θ_m + θ_c. But the change is no step of learning, and θ_c is trained in the
# same loop instead of coming from a distribution of tasks: there is one outer problem and no inner one. It comes
# nearer to meta-learning when the partner changes all the time, so that θ_m must survive a sum with *any* network;
# task 3 tests exactly that, with a partner that θ_m has never met.
#
# ## Similar work
#
# **Adding and averaging weights.** Averages along one run: SWA, Izmailov et al. 2018
# ([arXiv:1803.05407](https://arxiv.org/abs/1803.05407)). Averages of fine-tuned models: *Model soups*, Wortsman et
# al. 2022 ([2203.05482](https://arxiv.org/abs/2203.05482)). Sums of weight *differences* from one pretrained start:
# *Editing models with task arithmetic*, Ilharco et al. 2023 ([2212.04089](https://arxiv.org/abs/2212.04089)), and why
# it works near a linear regime, Ortiz-Jiménez et al. 2023 ([2305.12827](https://arxiv.org/abs/2305.12827)). Weighted
# merges: Fisher merging, Matena & Raffel 2022 ([2111.09832](https://arxiv.org/abs/2111.09832)); RegMean, Jin et al.
# 2023 ([2212.09849](https://arxiv.org/abs/2212.09849)); TIES, Yadav et al. 2023
# ([2306.01708](https://arxiv.org/abs/2306.01708)).
#
# **Networks from different starts.** When are two minima connected: Frankle et al. 2020
# ([1912.05671](https://arxiv.org/abs/1912.05671)), Entezari et al. 2022
# ([2110.06296](https://arxiv.org/abs/2110.06296)). Permuting channels first: by what they compute, Li et al. 2016
# ([1511.07543](https://arxiv.org/abs/1511.07543)); by their weights, *Git Re-Basin*, Ainsworth et al. 2023
# ([2209.04836](https://arxiv.org/abs/2209.04836)). Merging channels within networks of different tasks too: *ZipIt!*,
# Stoica et al. 2024 ([2305.03053](https://arxiv.org/abs/2305.03053)). Repairing the statistics afterwards: REPAIR,
# Jordan et al. 2023 ([2211.08403](https://arxiv.org/abs/2211.08403)).
#
# **The nearest relative**: *Composable Sparse Subnetworks via Maximum-Entropy Principle*, Caso et al., ICLR 2026
# ([OpenReview](https://openreview.net/forum?id=IHwx5ioIP2)): networks for some of the classes of one dataset, uniform
# on the others' images and pruned, whose weights are added. New here: the networks need no pruning and no common
# start, come from different datasets, and meet for the first time in the sum, under keys that each draws for itself.
# And what is lost is told apart: loud answers, shared channels, batch-norm statistics. Networks trained as in that work
# and as in this study, on the same halves, are compared [beside others](05_beside_others).
#
# **Several skills in one set of weights.** *Superposition of many models into one*, Cheung et al. 2019
# ([1902.05522](https://arxiv.org/abs/1902.05522)): a sum of keyed networks, from which a key retrieves one; of
# differences from one start, RanDeS, Zhou et al. 2025 ([2505.11204](https://arxiv.org/abs/2505.11204)). PackNet,
# Mallya & Lazebnik 2018 ([1711.05769](https://arxiv.org/abs/1711.05769)); *Supermasks in superposition*, Wortsman et
# al. 2020 ([2006.14769](https://arxiv.org/abs/2006.14769)).
#
# **Surviving a change of weights.** Flat minima by training against perturbed weights: SAM, Foret et al. 2021
# ([2010.01412](https://arxiv.org/abs/2010.01412)). MAML, Finn et al. 2017
# ([1703.03400](https://arxiv.org/abs/1703.03400)).
#
# **The parts used here.** VGG, Simonyan & Zisserman 2015 ([1409.1556](https://arxiv.org/abs/1409.1556)); batch norm,
# Ioffe & Szegedy 2015 ([1502.03167](https://arxiv.org/abs/1502.03167)); ResNet, He et al. 2016
# ([1512.03385](https://arxiv.org/abs/1512.03385)); initialization, He et al. 2015
# ([1502.01852](https://arxiv.org/abs/1502.01852)), with hidden linear layers smaller by √2, so that a *sum* of two starts
# at He's variance; distillation, Hinton et al. 2015 ([1503.02531](https://arxiv.org/abs/1503.02531)). MNIST, LeCun et
# al. 1998; SVHN, Netzer et al. 2011; CIFAR-10, Krizhevsky 2009.
#
# **In one sentence: two networks are summed by making their sum part of the forward pass, with batch-norm statistics
# of its own; whether the sum keeps their skills is what the next pages measure.**
