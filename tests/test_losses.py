import pytest
import torch
import torch.nn.functional as F

from weightsum_lib import three_term_loss
from weightsum_lib.losses import THIRD_TERMS


@pytest.fixture
def z():
    """Logits of the three networks and labels of the two tasks; the tasks have different numbers of images."""
    make = lambda n: torch.randn(n, 10, requires_grad=True)  # noqa: E731
    return {
        "main": make(6), "support": make(4), "sum": make(6), "sum_support": make(4),
        "y": torch.arange(6), "y_support": torch.arange(4) + 5,
    }  # fmt: skip


def expected(third, z, z_sum, y):
    ce, ce_sum = F.cross_entropy(z, y), F.cross_entropy(z_sum, y)
    p = z.detach().softmax(1)
    return {
        "none": torch.tensor(0.0),
        "ce": ce_sum,
        "signed_gap": ce_sum - ce,
        "loss_gap": (ce_sum - ce).abs(),
        "distill": (p * (p.log() - z_sum.log_softmax(1))).sum(1).mean(),
        "logit_difference": F.cross_entropy(z_sum - z, y),
    }[third]


def loss(z, **options):
    return three_term_loss(z["main"], z["y"], z["support"], z["y_support"], z["sum"], **options)


@pytest.mark.parametrize("third", THIRD_TERMS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_each_reading_is_its_formula_and_enters_the_total_with_its_weight(z, third, symmetric):
    got = loss(z, third=third, weight=0.3, logits_sum_support=z["sum_support"] if symmetric else None)
    wanted = expected(third, z["main"], z["sum"], z["y"])
    if symmetric:
        wanted = wanted + expected(third, z["support"], z["sum_support"], z["y_support"])
    torch.testing.assert_close(got.third, wanted)
    torch.testing.assert_close(got.main, F.cross_entropy(z["main"], z["y"]))
    torch.testing.assert_close(got.support, F.cross_entropy(z["support"], z["y_support"]))
    torch.testing.assert_close(got.total, got.main + got.support + 0.3 * wanted)


@pytest.mark.parametrize("third", [t for t in THIRD_TERMS if t != "none"])
def test_the_third_term_pulls_at_the_sum(z, third):
    loss(z, third=third).total.backward()
    assert z["sum"].grad.abs().sum() > 0


def test_signed_gap_at_weight_1_cancels_the_first_term(z):
    loss(z, third="signed_gap").total.backward()
    assert z["main"].grad.abs().max() < 1e-6


def test_distill_holds_the_main_network_fixed(z):
    loss(z, third="distill").third.backward()
    assert z["main"].grad is None


def test_unknown_readings_and_misfit_logits_are_refused(z):
    with pytest.raises(ValueError, match=r"unknown third term 'kl'.*distill"):
        loss(z, third="kl")
    z["sum"] = z["support"]
    with pytest.raises(ValueError, match=r"logits_sum is \(4, 10\); expected \(6, classes\)"):
        loss(z)
