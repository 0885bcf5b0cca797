"""CUDA graphs: a function's kernels, recorded once and then started together.

A UNet is about a thousand short kernels. Python starts them one by one, and the GPU waits for it.
A CUDA graph starts all of them with one call
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import torch


class CudaGraph:
    """A function of tensors on a CUDA GPU, recorded at the first call and replayed after that.

    function: takes tensors and returns a tuple of tensors. It must not read a value from the GPU.
    A graph works on fixed memory: the inputs are copied into its own tensors. The parameters of the
    function may change in place, and the next replay reads the new values. Inputs of other shapes
    replace the graph by a new one.
    """

    def __init__(self, function):
        self.function = function
        self.inputs = ()

    def __call__(self, *inputs):
        """The function's results, in memory of their own."""
        if [x.shape for x in inputs] != [x.shape for x in self.inputs]:
            self.record(inputs)
        for own, x in zip(self.inputs, inputs):
            own.copy_(x)
        self.graph.replay()
        return [x.clone() for x in self.outputs]

    def record(self, inputs):
        self.inputs, self.outputs, self.graph = (), (), None  # frees the memory of the old graph
        own = [x.clone() for x in inputs]
        self.function(*own)  # in the first call libraries prepare themselves; a graph cannot do so
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self.function(*own)
        self.inputs, self.graph = own, graph


class GraphedLoss:
    """A loss of losses.py, computed together with its gradient by one CUDA graph.

    loss: takes keyword arguments. theta: the trained tensors, a list. Call it like the loss:
    `backward()` of its value adds the gradient to the `grad` of each tensor in theta.
    The tensors that it gets must not need a gradient themselves.
    """

    def __init__(self, loss, theta):
        self.loss, self.theta = loss, theta
        self.graph = None

    def __call__(self, z_t, t, **batch):
        if not isinstance(t, torch.Tensor):
            t = torch.full((len(z_t),), t, device=z_t.device)  # a graph reads t from memory
        batch = dict(z_t=z_t, t=t) | batch
        names = [name for name, x in batch.items() if isinstance(x, torch.Tensor)]
        if self.graph is None:
            self.graph = CudaGraph(self.with_gradient(batch, names))
        value, *gradient = self.graph(*[batch[name] for name in names])
        return ValueWithGradient.apply(value, gradient, *self.theta)

    def with_gradient(self, batch, names):
        """A function of the batch's tensors: (the loss's value, its gradient)."""
        loss, theta = self.loss, self.theta
        models = {name: x for name, x in batch.items() if name not in names}

        def value_and_gradient(*tensors):
            with torch.enable_grad():
                value = loss(**models, **dict(zip(names, tensors)))
                return value.detach(), *torch.autograd.grad(value, theta)

        return value_and_gradient


class ValueWithGradient(torch.autograd.Function):
    """The value of a loss whose gradient is known before `backward()`."""

    @staticmethod
    def forward(ctx, value, gradient, *theta):
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    def backward(ctx, factor):
        torch._foreach_mul_(ctx.gradient, factor)
        return None, None, *ctx.gradient
