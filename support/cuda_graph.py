"""CUDA graphs: a function's kernels, recorded once and then started together.

A UNet is about a thousand short kernels. Python starts them one by one, and the GPU waits for
Python. A CUDA graph starts all of them with one call
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import torch
from torch.autograd.function import once_differentiable


def can_record(device):
    """Whether `device` can record graphs."""
    return device.type == "cuda"


class CudaGraph:
    """A function of tensors on a CUDA GPU, recorded at the first call and replayed after that.

    function: takes tensors and returns a tuple of tensors. Python must not need a number from the
    GPU in it: no `.item()`, no `if tensor`, no copy between CPU and GPU.
    A graph works on fixed memory: the inputs are copied into its own tensors. The parameters of the
    function may change in place, and the next replay reads the new values. They must not move to
    other memory (`p.data = …`). Inputs of other shapes or types replace the graph by a new one.
    """

    def __init__(self, function):
        self.function = function
        self.inputs = ()

    def __call__(self, *inputs):
        """The function's results. They are copies, because the next replay overwrites its own."""
        if kinds(inputs) != kinds(self.inputs):
            self.record(inputs)
        for own, x in zip(self.inputs, inputs):
            own.copy_(x)
        self.graph.replay()
        return [x.clone() for x in self.outputs]

    def record(self, inputs):
        self.inputs, self.outputs, self.graph = (), (), None
        torch.cuda.empty_cache()  # gives back the memory of the old graph
        own = [x.clone() for x in inputs]
        self.function(*own)  # cuBLAS and cuDNN prepare themselves; not allowed while recording
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self.function(*own)
        self.inputs, self.graph = own, graph


def kinds(tensors):
    return [(x.shape, x.dtype) for x in tensors]


class GraphedLoss:
    """A loss of losses.py, computed together with its gradient by one CUDA graph.

    loss: takes keyword arguments. theta: the trained tensors, a list. Call it like the loss:
    `backward()` of its value adds the gradient to the `grad` of each tensor in theta.
    It is recorded once: each call must have the same models, names and batch size, and tensors that
    need no gradient themselves.
    """

    def __init__(self, loss, theta):
        self.loss, self.theta = loss, theta
        self.graph = None

    def __call__(self, z_t, t, **batch):
        if not isinstance(t, torch.Tensor):
            t = torch.full((len(z_t),), t, device=z_t.device)  # a graph reads t from memory
        batch = dict(z_t=z_t, t=t) | batch
        tensors = {}
        for name, x in batch.items():
            if isinstance(x, torch.Tensor):
                # One prompt for all latents, or one for each: the same shape, so the same graph.
                tensors[name] = x.expand(len(z_t), *x.shape[1:])
        if self.graph is None:
            models = {name: x for name, x in batch.items() if name not in tensors}
            self.graph = CudaGraph(self.with_gradient(models, list(tensors)))
        value, *gradient = self.graph(*tensors.values())
        return ValueWithGradient.apply(value, gradient, *self.theta)

    def with_gradient(self, models, names):
        """A function of the batch's tensors: (the loss's value, its gradient)."""
        loss, theta = self.loss, self.theta

        def value_and_gradient(*tensors):
            with torch.enable_grad():
                value = loss(**models, **dict(zip(names, tensors, strict=True)))
                return value.detach(), *torch.autograd.grad(value, theta)

        return value_and_gradient


class ValueWithGradient(torch.autograd.Function):
    """The value of a loss whose gradient is known before `backward()`."""

    @staticmethod
    def forward(ctx, value, gradient, *theta):
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        """factor: the derivative of the whole loss with respect to this value."""
        gradient, ctx.gradient = ctx.gradient, None  # torch then takes these tensors as they are
        torch._foreach_mul_(gradient, factor)
        return None, None, *gradient
