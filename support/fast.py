"""How training and sampling become fast, or need less memory, outside the lesson.

A UNet is about a thousand short kernels. Python starts them one by one, and the GPU waits for
Python. A CUDA graph starts all of them with one call
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import copy
from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from support.cli import memory_is_full
from support.errors import first_line, warning
from unet import ResnetBlock, Transformer


def can_record(device):
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


def compiled(unet):
    """The UNet as torch.compile makes it; if that fails, a warning, and the UNet as it is."""
    fast = None

    def evaluate(*inputs):
        nonlocal fast
        try:
            if fast is None:
                fast = torch.compile(unet, dynamic=False, fullgraph=True)
            return fast(*inputs)
        except Exception as e:  # of many classes, from dynamo, Inductor, Triton or a C compiler
            if fast is unet or memory_is_full(e):
                raise
            why = first_line(getattr(e, "inner_exception", e))
            warning(f"torch.compile failed, so it is not used: {why}")
            fast = unet
        return unet(*inputs)

    return evaluate


class InferenceUNet:
    """A UNet for sampling only: ε(z, t, c), float32 in and out, computed in `dtype` on `device`.

    It shares the tensors that already have this type and device, and copies the others once.
    (Autocast would cast every float32 weight in each evaluation and, on CUDA, the input and output
    of each norm.) On CUDA it replays a CUDA graph.
    compile: on CUDA, the graph is made of torch.compile's kernels. One of them does the work of
    several others, so fewer results travel through the GPU's memory (docs/benchmarks.md).
    """

    def __init__(self, unet, device, dtype, compile=False):
        self.device, self.dtype = device, dtype
        self.source, self.copies = [], []
        own = {}  # id of a parameter: the tensor that takes its place
        for p in unet.parameters():
            own[id(p)] = p
            if p.dtype != dtype or p.device.type != device.type:
                copied = torch.nn.Parameter(p.detach().to(device, dtype), requires_grad=False)
                own[id(p)] = copied
                self.source.append(p)
                self.copies.append(copied)
        self.unet = copy.deepcopy(unet, memo=own)
        for module in self.unet.modules():
            # --gradient-checkpointing's `forward` refers to its block, and so keeps copies alive.
            vars(module).pop("forward", None)
        self.graph = None
        if device.type == "cuda":
            self.unet.to(memory_format=torch.channels_last)  # faster, see docs/benchmarks.md
        if can_record(device):
            unet = self.unet  # not `self`, so that this object is freed with its last reference
            if compile:
                print("compiling the UNet that samples z_t: about a minute")
                unet = compiled(unet)
            self.graph = CudaGraph(lambda *inputs: (unet(*inputs),))
        elif compile:
            warning("--compile needs a CUDA GPU, so it is not used.")

    def __call__(self, z, t, context):
        z, context = z.to(self.dtype), context.to(self.dtype)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.graph is None:
                return self.unet(z, t, context).float()
            t = torch.full((len(z),), t, device=z.device)  # a graph reads t from memory
            return self.graph(z, t, context)[0].float()

    @torch.no_grad()
    def sync(self):
        """Copies the source UNet's current weights."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.source)


def checkpoint_blocks(unet):
    """Keeps only each block's input for the backward pass, and computes the rest again there."""
    for block in unet.modules():
        if isinstance(block, (ResnetBlock, Transformer)):
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )


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
            self.graph = CudaGraph(partial(self.value_and_gradient, models, list(tensors)))
        value, *gradient = self.graph(*tensors.values())
        return ValueWithGradient.apply(value, gradient, *self.theta)

    def value_and_gradient(self, models, names, *tensors):
        with torch.enable_grad():
            value = self.loss(**models, **dict(zip(names, tensors, strict=True)))
            return value.detach(), *torch.autograd.grad(value, self.theta)


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


def graphed(loss, theta, a, device, dtype):
    """The loss with its gradient as one CUDA graph, where that is possible; else the loss.

    theta: {name: trained tensor}. a: the run's settings. It is not possible for
    - the user's own loss: it may read values from the GPU;
    - a trained embedding: its gradient goes through the prompts;
    - most of the UNet: the graph keeps a gradient of its own, of the same size;
    - float16: the loss must be multiplied before its gradient is computed (GradScaler).
    """
    few = a.train_params in ("xattn", "kv", "v")
    if can_record(device) and few and not a.loss and dtype != torch.float16:
        return GraphedLoss(loss, list(theta.values()))
    return loss
