"""The network in Keras 2, and with fake quantization: what the process that trains it works on."""

from typing import Any

import numpy as np


def rebuild(keras: Any, nodes: list[dict[str, Any]], inputs: str, output: str, weights: dict[str, np.ndarray]) -> Any:
    """Return the network in Keras 2."""
    tensors: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    own = _own_layers(keras)
    for node in nodes:
        if node["kind"] == "InputLayer":
            tensors[node["name"]] = keras.Input(node["shape"], name=node["name"])
            continue
        if node["layer"] not in layers:
            kind = own.get(node["kind"]) or getattr(keras.layers, node["kind"])
            layers[node["layer"]] = kind(**node["config"], name=node["layer"])
        read = [tensors[name] for name in node["inputs"]]
        tensors[node["name"]] = layers[node["layer"]](read if node["is_list"] else read[0])
    model = keras.Model(tensors[inputs], tensors[output])
    stored = {node["layer"]: [weights[key] for key in node["weights"]] for node in nodes}
    for name, layer in layers.items():
        if stored[name]:
            layer.set_weights(stored[name])
        if type(layer).__name__ == "BatchNormalization":
            layer.trainable = False  # statistics of small batches would undo the calibration
    return model


def _own_layers(keras: Any) -> dict[str, Any]:
    """Return the layers that Keras 2 has not: each is one operator, so that each has a range to learn."""
    import tensorflow as tf

    class HardSwish(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x * tf.nn.relu6(x + 3.0) * (1 / 6)

    class ChannelMean(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return tf.reduce_mean(x, axis=-1, keepdims=True)

    class Offset(keras.layers.Layer):
        def __init__(self, value: float, **options: Any) -> None:
            super().__init__(**options)
            self.value = value

        def call(self, x: Any) -> Any:
            return x + self.value

        def get_config(self) -> dict[str, Any]:
            return super().get_config() | {"value": self.value}

    class InverseRoot(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return tf.math.rsqrt(x)

    class ChannelScale(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.scale = self.add_weight(name="scale", shape=(shape[-1],), initializer="ones")

        def call(self, x: Any) -> Any:
            return x * self.scale

    class ChannelShift(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.shift = self.add_weight(name="shift", shape=(shape[-1],), initializer="zeros")

        def call(self, x: Any) -> Any:
            return x + self.shift

    return {one.__name__: one for one in (HardSwish, ChannelMean, Offset, InverseRoot, ChannelScale, ChannelShift)}


def quantized(keras: Any, tfmot: Any, model: Any) -> Any:
    """Return the network with fake quantization: tfmot's scheme, and a range for the output of what it has none for."""
    quantization: Any = tfmot.quantization.keras

    class OutputRange(quantization.QuantizeConfig):
        def get_weights_and_quantizers(self, layer: Any) -> list[Any]:
            return []

        def get_activations_and_quantizers(self, layer: Any) -> list[Any]:
            return []

        def set_quantize_weights(self, layer: Any, quantize_weights: Any) -> None:
            pass

        def set_quantize_activations(self, layer: Any, quantize_activations: Any) -> None:
            pass

        def get_output_quantizers(self, layer: Any) -> list[Any]:
            make = quantization.quantizers.MovingAverageQuantizer
            return [make(num_bits=8, per_axis=False, symmetric=False, narrow_range=False)]

        def get_config(self) -> dict[str, Any]:
            return {}

    # Classes are made by each call: those that the network is built of are the ones to know again.
    kinds = [type(layer) for layer in model.layers]
    own = {kind.__name__: kind for kind in kinds if kind.__name__ in _own_layers(keras)}
    ranged = (*own.values(), keras.layers.Multiply, keras.layers.Subtract)

    def annotated(layer: Any) -> Any:
        return quantization.quantize_annotate_layer(layer, OutputRange()) if isinstance(layer, ranged) else layer

    with quantization.quantize_scope({"OutputRange": OutputRange, **own}):
        marked = keras.models.clone_model(model, clone_function=annotated)
        return quantization.quantize_apply(quantization.quantize_annotate_model(marked), _scheme(keras, quantization))


def _scheme(keras: Any, quantization: Any) -> Any:
    """Return tfmot's scheme, but that every kernel is rounded as the converter will round it.

    Tfmot leaves kernels in float where a ReLU follows and no norm stands between (`LayerReLUQuantize`), and rounds
    depthwise kernels by one step for all channels.
    """
    import tensorflow as tf

    class Channels(quantization.quantizers.Quantizer):
        """127 steps each way from the largest weight of each channel, which the converter finds again."""

        def __init__(self, axes: tuple[int, ...]) -> None:
            self.axes = axes

        def build(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
            return {}

        def __call__(self, inputs: Any, training: bool, weights: Any, **_: Any) -> Any:
            step = tf.reduce_max(tf.abs(inputs), self.axes, keepdims=True) / 127
            rounded = tf.round(tf.math.divide_no_nan(inputs, step)) * step
            return inputs + tf.stop_gradient(rounded - inputs)

        def get_config(self) -> dict[str, Any]:
            return {"axes": self.axes}

    class Kernel(quantization.QuantizeConfig):
        """A kernel by channels, and the output where no ReLU follows."""

        def __init__(self, name: str, axes: tuple[int, ...], has_range: bool) -> None:
            self.name, self.axes, self.has_range = name, axes, has_range

        def get_weights_and_quantizers(self, layer: Any) -> list[Any]:
            return [(getattr(layer, self.name), Channels(self.axes))]

        def get_activations_and_quantizers(self, layer: Any) -> list[Any]:
            make = quantization.quantizers.MovingAverageQuantizer
            quantizer = make(num_bits=8, per_axis=False, symmetric=False, narrow_range=False)
            return [(layer.activation, quantizer)] if self.has_range else []

        def set_quantize_weights(self, layer: Any, quantize_weights: Any) -> None:
            setattr(layer, self.name, quantize_weights[0])

        def set_quantize_activations(self, layer: Any, quantize_activations: Any) -> None:
            if self.has_range:
                layer.activation = quantize_activations[0]

        def get_output_quantizers(self, layer: Any) -> list[Any]:
            return []

        def get_config(self) -> dict[str, Any]:
            return {"name": self.name, "axes": self.axes, "has_range": self.has_range}

    kernels = {
        keras.layers.Conv2D: ("kernel", (0, 1, 2)),
        keras.layers.DepthwiseConv2D: ("depthwise_kernel", (0, 1)),
        keras.layers.Dense: ("kernel", (0,)),
    }

    class Layout(quantization.default_8bit.Default8BitQuantizeLayoutTransform):
        def apply(self, model: Any, layer_quantize_map: Any) -> Any:
            model, configs = super().apply(model, layer_quantize_map)
            for layer in model.layers:
                if type(layer) not in kernels or layer.name not in configs:
                    continue
                known = configs[layer.name]["quantize_config"]
                before_relu = known is not None and not known.get_weights_and_quantizers(layer)
                if before_relu or isinstance(layer, keras.layers.DepthwiseConv2D):
                    configs[layer.name]["quantize_config"] = Kernel(*kernels[type(layer)], has_range=not before_relu)
            return model, configs

    class Scheme(quantization.default_8bit.Default8BitQuantizeScheme):
        def get_layout_transformer(self) -> Any:
            return Layout()

    return Scheme()
