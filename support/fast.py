"""How training and sampling become fast, or need less memory, outside the lesson."""

import copy
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from support.cli import memory_is_full
from support.cuda_graph import CudaGraph, GraphedLoss, can_record
from support.errors import first_line, warning
from unet import ResnetBlock, Transformer


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
    of each norm.) On CUDA it replays a CUDA graph (support/cuda_graph.py).
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
