"""nanodiff: image diffusion with no deep-learning framework; every layer's backward is written by hand.

Only names live here. Each is imported when it is first used, so that `import nanodiff` costs next to nothing.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "Adam": "optim",
    "Context": "context",
    "Diffusion": "diffusion",
    "NanodiffError": "context",
    "UNet": "unet",
    "UNetConfig": "unet",
    "bits_per_dim": "metrics",
    "ddim_invert": "samplers",
    "ddim_sample": "samplers",
    "ddpm_sample": "samplers",
    "dpm_sample": "samplers",
    "load_data": "data",
    "load_run": "checkpoint",
    "sample": "samplers",
    "set_threads": "context",
    "step_list": "samplers",
    "train_step": "train",
    "usable_device": "context",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'nanodiff' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"nanodiff.{_HOME[name]}"), name)


def __dir__():
    return [*__all__, "__version__"]
