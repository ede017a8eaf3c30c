"""What torch.compile makes of an encoder for a GPU, as far as a machine without one can see it: Inductor lowers and
schedules its graphs for an H100, which is where it chooses what to fuse, and compiles no kernel.

This looks into PyTorch where nothing is promised. Seen to work with 2.11 and 2.14."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from reco_fast.method.model import channels_last
from reco_fast.method.norms import batch_norms, use_groups
from reco_fast.method.state import compile_encoder

GPU = torch.device("cuda", 0)
SIZES = {
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 2**16,
    "max_threads_per_multi_processor": 2048,
    "warp_size": 32,
    "major": 9,
}
H100 = SimpleNamespace(
    **SIZES,
    minor=0,
    name="NVIDIA H100",
    total_memory=80 * 2**30,
    gcnArchName="",
    L2_cache_size=50 * 2**20,
    shared_memory_per_block_optin=227 * 2**10,
)


BATCH, SIDE, CHANNELS = 512, 8, 512
ACTIVATION = BATCH * CHANNELS * (SIDE // 2) ** 2  # numbers, the smaller kind and of one view


def end_of_a_resnet(channels: int = CHANNELS) -> nn.Sequential:
    shortcut = nn.Sequential(nn.Conv2d(channels // 2, channels, 1, 2, bias=False), nn.BatchNorm2d(channels))
    return nn.Sequential(
        nn.Conv2d(3, channels // 2, 3, padding=1, bias=False),
        BasicBlock(channels // 2, channels, 2, shortcut),
        BasicBlock(channels, channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 128),
    )


def forward_and_backward(module: nn.Module, images: Tensor) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """The graphs that a compiler is given for a call in mixed precision."""
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    names, weights = zip(*module.named_parameters(), strict=True)
    buffers = dict(module.named_buffers())

    def call(*inputs: Tensor) -> tuple[Tensor]:
        tensors = buffers | dict(zip(names, inputs[:-1], strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            return (torch.func.functional_call(module, tensors, (inputs[-1],)),)

    table = select_decomp_table()
    joint = aot_export_joint_simple(call, (*weights, images), trace_joint=True, decompositions=table)
    return min_cut_rematerialization_partition(joint, None, num_fwd_outputs=1, compiler="inductor")


def schedule_for_a_gpu(graph: torch.fx.GraphModule, monkeypatch: pytest.MonkeyPatch, *, backward: bool) -> list[Any]:
    """The kernels, unfused ones too, that Inductor would compile. `graph` ends up on a GPU that is not there."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    properties = DeviceProperties(type="cuda", index=0, cc=90, max_threads_per_block=1024, **SIZES)
    monkeypatch.setattr(DeviceProperties, "create", lambda _: properties)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda *_: H100)
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None)
    # Its answer is kept, and may be from code that this process has compiled for the CPU.
    monkeypatch.setattr("torch._inductor.scheduler.has_triton", lambda: True)

    def moved(argument: Any) -> Any:
        return GPU if isinstance(argument, torch.device) else argument

    for node in graph.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, moved)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, moved)
    given = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with FakeTensorMode() as mode, torch.no_grad():
        inputs = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=GPU) for v in given]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    lowering = GraphLowering(graph, example_inputs=inputs, is_backward=backward)
    with V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()), torch.no_grad():
        lowering.run(*inputs)
        lowering._update_scheduler()
    return lowering.scheduler.nodes


def written(kernel: Any, dtype: torch.dtype) -> list[int]:
    """How many numbers each tensor of `dtype` has that a kernel leaves in memory."""
    inside = {part.get_name() for part in kernel.get_nodes()}
    left = [
        b.node for b in kernel.get_outputs() if not {user.node.get_name() for user in b.users if user.node} <= inside
    ]
    return [math.prod(map(int, node.get_size())) for node in left if node.maybe_get_dtype() == dtype]


@pytest.mark.parametrize(("groups", "views"), [(1, 2), (8, 2)])
def test_batch_norms_in_groups_are_scheduled_forward_and_backward(
    groups: int, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}
    monkeypatch.setattr("torch.compile", lambda module, **given: options.update(given.get("options", {})) or module)
    encoder = channels_last(compile_encoder(end_of_a_resnet()))
    use_groups(encoder, groups, views)
    for norm in batch_norms(encoder):  # graphs traced in this way write to no input, such as running averages
        norm.num_batches_tracked = norm.running_mean = norm.running_var = None
    images = torch.zeros(BATCH * views, 3, SIDE, SIDE, dtype=torch.half).to(memory_format=torch.channels_last)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    forward, backward = forward_and_backward(encoder, images)
    with torch._inductor.config.patch(options):
        for graph in (forward, backward):
            kernels = schedule_for_a_gpu(graph, monkeypatch, backward=graph is backward)
            assert len(kernels) > 20
            wide = [numbers for kernel in kernels for numbers in written(kernel, torch.float32)]
            assert max(wide) < ACTIVATION, "float32 where bfloat16 would do: twice the memory traffic"
