import pytest
import torch
import torch.nn.functional as F

from weightsum_lib.core import losses
from weightsum_lib.core.losses import THIRD_TERMS, three_term_loss


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


def test_each_reading_is_the_function_of_its_name():
    assert [getattr(losses, name).__name__ for name in THIRD_TERMS] == list(THIRD_TERMS)


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


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1.0])
@pytest.mark.parametrize("third", [t for t in THIRD_TERMS if t != "none"])
def test_a_third_term_of_weight_0_counts_as_0_even_if_it_is_infinite(z, third, value):
    z["sum"] = (z["sum"].detach() * value).requires_grad_()
    got = loss(z, third=third, weight=0.0)
    assert got.third.isfinite() == (value == 1.0)  # its value is told all the same
    assert torch.equal(got.total, F.cross_entropy(z["main"], z["y"]) + F.cross_entropy(z["support"], z["y_support"]))
    got.total.backward()
    assert z["sum"].grad is None and z["main"].grad.isfinite().all()


@pytest.mark.no_cover
def test_it_can_be_compiled_as_one_graph(z):
    compiled = torch.compile(three_term_loss, fullgraph=True, backend="eager")
    for third in THIRD_TERMS:
        got = compiled(z["main"], z["y"], z["support"], z["y_support"], z["sum"], third=third, weight=0.3)
        assert torch.equal(got.total, loss(z, third=third, weight=0.3).total)


def test_unknown_readings_and_misfit_logits_are_refused(z):
    with pytest.raises(ValueError, match=r"unknown third term 'kl'.*distill"):
        loss(z, third="kl")
    with pytest.raises(ValueError, match=r"logits_sum_support is \(6, 10\); expected \(4, classes\)"):
        loss(z, logits_sum_support=z["sum"])
    with pytest.raises(ValueError, match=r"logits_sum is \(6, 1\).*as many classes"):  # would be broadcast
        loss({**z, "sum": z["sum"][:, :1]}, third="logit_difference")
    with pytest.raises(ValueError, match=r"logits_sum is \(4, 10\); expected \(6, classes\)"):
        loss({**z, "sum": z["support"]})
