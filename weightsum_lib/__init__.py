"""Learning to sum neural-network weights: networks, their sum, the three-term loss, and the study around them."""

from importlib import import_module

# Exported name: its module. Loaded on first use, so that make can find out without torch that nothing is to be done.
EXPORTS = {
    "accuracy": "evaluate",
    "recalibrate": "batchnorm",
    "Dataset": "data",
    "DataError": "data",
    "three_term_loss": "losses",
    "ThreeTermLoss": "losses",
    "normalize": "models",
    "vgg8": "models",
    "vgg16": "models",
    "Params": "params",
    "ParamsError": "params",
    "Study": "study",
    "synthesize": "synthetic",
    "Run": "train",
    "RunConfig": "train",
    "compare_layers": "weights",
    "weighted_sum": "weights",
    "WeightSum": "weights",
}
__all__ = sorted(EXPORTS)


def __getattr__(name):
    if name in EXPORTS:
        return getattr(import_module(f"weightsum_lib.{EXPORTS[name]}"), name)
    raise AttributeError(f"module 'weightsum_lib' has no attribute '{name}'")


def __dir__():
    return __all__
