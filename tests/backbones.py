"""Small backbones of keras_cv and keras_hub with random weights; None of them downloads anything."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras
import pytest

from tests import zoo

BACKBONES: dict[str, Callable[[int], keras.Model]] = {}


def library(name: str) -> ModuleType:
    """Import an optional library, or skip the test; its own warnings are not ours to mend."""
    pytest.importorskip(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def build(name: str, *, size: int = 64, seed: int = 0) -> keras.Model:
    """A new backbone with generic weights; `size` is the height and width of its images."""
    keras.utils.clear_session(free_memory=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zoo.randomise(BACKBONES[name](size), seed=seed)


def backbone(function: Callable[[int], keras.Model]) -> Callable[[int], keras.Model]:
    BACKBONES[function.__name__] = function
    return function


def _cv(name: str, *, size: int, **options: Any) -> keras.Model:
    return getattr(library("keras_cv").models, name)(include_rescaling=True, input_shape=(size, size, 3), **options)


@backbone
def cv_resnet(size: int) -> keras.Model:
    return _cv(
        "ResNetBackbone",
        size=size,
        stackwise_filters=[64, 72],
        stackwise_blocks=[1, 2],
        stackwise_strides=[1, 2],
        block_type="basic_block",
    )


@backbone
def cv_resnet_v2(size: int) -> keras.Model:
    return _cv(
        "ResNetV2Backbone", size=size, stackwise_filters=[8, 12], stackwise_blocks=[2, 2], stackwise_strides=[1, 2]
    )


@backbone
def cv_efficientnet_lite(size: int) -> keras.Model:
    return _cv(
        "EfficientNetLiteBackbone",
        size=size,
        width_coefficient=0.5,
        depth_coefficient=1.0,
        stackwise_kernel_sizes=[3, 3, 5],
        stackwise_num_repeats=[1, 2, 2],
        stackwise_input_filters=[32, 16, 24],
        stackwise_output_filters=[16, 24, 40],
        stackwise_expansion_ratios=[1, 6, 6],
        stackwise_strides=[1, 2, 2],
    )


@backbone
def cv_efficientnet_v2(size: int) -> keras.Model:
    """Fused blocks with and without expansion and squeeze-excite, and unfused ones."""
    return _cv(
        "EfficientNetV2Backbone",
        size=size,
        width_coefficient=0.25,
        depth_coefficient=1.0,
        stackwise_kernel_sizes=[3, 3, 3, 5],
        stackwise_num_repeats=[1, 2, 2, 1],
        stackwise_input_filters=[32, 32, 48, 64],
        stackwise_output_filters=[32, 48, 64, 64],
        stackwise_expansion_ratios=[1, 4, 4, 2],
        stackwise_squeeze_and_excite_ratios=[0, 0, 0.25, 0.5],
        stackwise_strides=[1, 2, 2, 1],
        stackwise_conv_types=["fused", "fused", "unfused", "fused"],
    )


@backbone
def cv_mobilenet_v3(size: int) -> keras.Model:
    """The small one: squeeze-excite with a hard sigmoid, hard-swish written out."""
    return _cv(
        "MobileNetV3Backbone",
        size=size,
        alpha=0.5,
        stackwise_expansion=[1, 72 / 16, 88 / 24, 4, 6, 6],
        stackwise_filters=[16, 24, 24, 40, 40, 40],
        stackwise_kernel_size=[3, 3, 3, 5, 5, 5],
        stackwise_stride=[2, 2, 1, 2, 1, 1],
        stackwise_se_ratio=[0.25, None, None, 0.25, 0.25, 0.25],
        stackwise_activation=["relu", "relu", "relu", "hard_swish", "hard_swish", "hard_swish"],
    )


@backbone
def cv_csp_darknet(size: int) -> keras.Model:
    return _cv("CSPDarkNetBackbone", size=size, stackwise_channels=[16, 24, 32, 40], stackwise_depth=[1, 2, 2, 1])


@backbone
def cv_csp_darknet_depthwise(size: int) -> keras.Model:
    return _cv(
        "CSPDarkNetBackbone",
        size=size,
        stackwise_channels=[16, 24, 32, 40],
        stackwise_depth=[1, 1, 2, 1],
        use_depthwise=True,
    )


@backbone
def cv_mit(size: int) -> keras.Model:
    return _cv("MiTBackbone", size=size, depths=[1, 2, 1, 1], embedding_dims=[8, 16, 20, 32])


@backbone
def hub_vit(size: int) -> keras.Model:
    return library("keras_hub").models.ViTBackbone(
        image_shape=(size, size, 3),
        patch_size=16,
        num_layers=3,
        num_heads=3,
        hidden_dim=48,
        mlp_dim=96,
        dropout_rate=0.1,
    )


@backbone
def hub_deit(size: int) -> keras.Model:
    return library("keras_hub").models.DeiTBackbone(
        image_shape=(size, size, 3), patch_size=16, num_layers=3, num_heads=3, hidden_dim=48, intermediate_dim=96
    )


@backbone
def hub_mit(size: int) -> keras.Model:
    return library("keras_hub").models.MiTBackbone(
        image_shape=(size, size, 3),
        layerwise_depths=[1, 2],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.1,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        hidden_dims=[16, 32],
    )
