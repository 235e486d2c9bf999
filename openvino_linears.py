"""
The language model's linears in 8 bits, multiplied by OpenVINO: a fast format on processors.

torch reads weights narrower than float32 slowly there, and in passes over many tokens more slowly still. OpenVINO reads 8-bit weights,
with one scale an output, and multiplies in float32. It has the heads too, in float32: 8 bits there change more than in all linears.
All else, plugins and routers too, is computed by torch, in float32.
"""

import os
import threading

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from .errors_healthgpt import HealthGPTError
from .modeling_healthgpt import HealthGPTForConditionalGeneration, HLoRALinear
from .quantization_healthgpt import UnquantizedLinear
from .refusals import extras

LARGEST = 127  # of the whole numbers that weights become

logger = logging.get_logger(__name__)


class OpenVINOLinear(nn.Module):
    """
    A frozen linear whose weights OpenVINO holds: they are no parameters, and the module cannot be saved.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`): The weights, in float32 or as whole numbers in int8.
        scales (`torch.Tensor` of shape `(out_features,)` and dtype float32, *optional*): What the whole numbers of each output are
            multiplied by.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*): Added to the outputs.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor | None = None, bias: torch.Tensor | None = None):
        super().__init__()
        import openvino
        from openvino import opset13

        self.out_features, self.in_features = weight.shape
        inputs = opset13.parameter([-1, self.in_features], openvino.Type.f32)
        matrix = opset13.constant(weight.numpy())
        if scales is not None:
            matrix = opset13.convert(matrix, openvino.Type.f32)
            matrix = opset13.multiply(matrix, opset13.constant(scales[:, None].numpy()))
        product = opset13.matmul(inputs, matrix, transpose_a=False, transpose_b=True)
        if bias is not None:
            product = opset13.add(product, opset13.constant(bias.detach().float().numpy()))
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else it may round inputs to 8 bits
        }
        compiled = openvino.compile_model(openvino.Model([product], [inputs]), "CPU", settings)
        self._request, self._tensor, self._lock = compiled.create_infer_request(), openvino.Tensor, threading.Lock()

    def forward(self, hidden_states):
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise HealthGPTError("OpenVINO's linears give no gradients: train the model as it was loaded.")
        if hidden_states.device.type != "cpu":
            raise HealthGPTError(f"OpenVINO's linears are on the CPU, and their input is on {hidden_states.device}.")
        tokens = hidden_states.detach().reshape(-1, self.in_features).float().contiguous()
        output = np.empty((len(tokens), self.out_features), np.float32)
        if len(tokens) > 0:
            with self._lock:  # a request serves one call at a time
                self._request.set_input_tensor(self._tensor(tokens.numpy(), shared_memory=True))
                self._request.set_output_tensor(self._tensor(output, shared_memory=True))
                self._request.infer()
        return torch.from_numpy(output).view(*hidden_states.shape[:-1], self.out_features).to(hidden_states.dtype)

    def _save_to_state_dict(self, *args, **kwargs):
        refuse_saving()

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}"


def use_openvino(model: HealthGPTForConditionalGeneration) -> HealthGPTForConditionalGeneration:
    """
    Gives OpenVINO a model's linears in 8 bits and its heads, and makes the rest float32; the model is changed in place.

    Call it last: the model then answers and draws, with the same calls, on the CPU, and can be neither trained, saved nor copied, nor
    be given further tasks, tokens or adapters. Where torch's threads wait for work by spinning they are in OpenVINO's way: `OMP_WAIT_POLICY=passive`, set before torch is imported,
    prevents it.

    Args:
        model (`HealthGPTForConditionalGeneration`): A model on the CPU whose linears are not quantised, or in 8 bits by
            bitsandbytes, whose weights and scales are then taken over.

    Returns:
        `HealthGPTForConditionalGeneration`: The model.

    Raises:
        HealthGPTError: if OpenVINO is not installed, this is another model (a PEFT model, say), or a linear is elsewhere than in the
            CPU's memory or of another kind; the model is then as it was.
    """
    with extras():
        import openvino  # noqa: F401
    if type(model).__name__ != HealthGPTForConditionalGeneration.__name__:
        raise HealthGPTError(f"OpenVINO takes a HealthGPTForConditionalGeneration, got a {type(model).__name__}.")
    # By name, since a checkpoint's own copy of the code has classes of its own.
    layers = [layer for layer in model.modules() if type(layer).__name__ == HLoRALinear.__name__]
    heads = [(model, "lm_head"), *((model.token_heads, name) for name in model.token_heads)]
    for linear in (*(layer.base_layer for layer in layers), *(getattr(*place) for place in heads)):
        require_plain(linear)
    if torch.get_num_threads() > 1 and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        logger.warning(
            "OpenVINO is slower while torch's threads spin: set OMP_WAIT_POLICY=passive before torch is imported."
        )
    for layer in layers:
        layer.base_layer = OpenVINOLinear(*in_8_bits(layer.base_layer), layer.base_layer.bias)
    for parent, name in heads:
        setattr(parent, name, OpenVINOLinear(getattr(parent, name).weight.detach().float()))
    model.requires_grad_(False)
    model.config.dtype = torch.float32
    model.save_pretrained = refuse_saving  # before it writes anything
    model.__dict__.pop("_pass_seconds", None)  # how long passes took until now
    return nn.Module.float(model)  # what transformers has in its place refuses models that were quantised


def refuse_saving(*args, **kwargs):
    raise HealthGPTError(
        "OpenVINO has the model's linears, and they cannot be saved: save the model as it was loaded."
    )


def require_plain(linear: nn.Module) -> None:
    """
    Raises:
        HealthGPTError: if OpenVINO cannot take over a linear.
    """
    if isinstance(linear, OpenVINOLinear):
        raise HealthGPTError("OpenVINO has this model's linears already.")
    is_known = type(linear).__name__ in (nn.Linear.__name__, UnquantizedLinear.__name__, "Linear8bitLt")
    if not is_known or type(linear.weight.data) is not torch.Tensor:  # but of a class of a quantiser
        weight = type(getattr(linear, "weight", None)).__name__
        raise HealthGPTError(
            "OpenVINO takes linears that are not quantised, or in 8 bits by bitsandbytes, without adapters around them; got "
            f"{type(linear).__name__} with {weight}."
        )
    if linear.weight.device.type == "meta":
        raise HealthGPTError("OpenVINO takes models that are whole in memory: load this one without device_map.")
    if linear.weight.device.type != "cpu":
        raise HealthGPTError(f"OpenVINO is for models on the CPU, and a linear is on {linear.weight.device}.")


def in_8_bits(linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of a linear as whole numbers, and the scale of each output."""
    weight = linear.weight.detach()
    if (
        weight.dtype == torch.int8
    ):  # bitsandbytes keeps the largest weight of each output, elsewhere once it was multiplied with
        largest = linear.state.SCB if linear.weight.SCB is None else linear.weight.SCB
        return weight, largest.float() / LARGEST
    weight = weight.float()
    scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (weight / scales[:, None]).round().to(torch.int8), scales
