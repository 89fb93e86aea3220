"""Learning to sum neural-network weights: networks, their sum, the three-term loss, and the study around them."""

from importlib import import_module

# Public name: its module. Loaded on first use, so that make can find out without torch that nothing is to be done.
EXPORTS = {
    "recalibrate": "core.batchnorm",
    "Channels": "core.keys",
    "hidden_channels": "core.channels",
    "Key": "core.keys",
    "compact": "core.keys",
    "deal": "core.keys",
    "draw": "core.keys",
    "overlap": "core.keys",
    "widen": "core.keys",
    "ThreeTermLoss": "core.losses",
    "three_term_loss": "core.losses",
    "Ensemble": "core.merging",
    "activation_matching": "core.merging",
    "average": "core.merging",
    "correlations": "core.merging",
    "fisher_average": "core.merging",
    "fisher_information": "core.merging",
    "fold": "core.merging",
    "random_like": "core.merging",
    "random_signs": "core.merging",
    "regmean": "core.merging",
    "relabelled": "core.merging",
    "task_arithmetic": "core.merging",
    "ties": "core.merging",
    "weight_matching": "core.merging",
    "zipped": "core.merging",
    "CenteredBatchNorm2d": "core.models",
    "normalize": "core.models",
    "resnet20": "core.models",
    "vgg16": "core.models",
    "vgg8": "core.models",
    "WeightSum": "core.weights",
    "compare_layers": "core.weights",
    "weighted_sum": "core.weights",
    "DataError": "study.data",
    "Dataset": "study.data",
    "Method": "study.params",
    "Params": "study.params",
    "ParamsError": "study.params",
    "Study": "study.runs",
    "synthesize": "study.synthetic",
    "Run": "study.train",
    "RunConfig": "study.config",
    "train": "study.train",
}
__all__ = sorted(EXPORTS)


def __getattr__(name):
    if name in EXPORTS:
        return getattr(import_module(f"weightsum_lib.{EXPORTS[name]}"), name)
    raise AttributeError(f"module 'weightsum_lib' has no attribute '{name}'")


def __dir__():
    return __all__
