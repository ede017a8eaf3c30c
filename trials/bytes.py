"""What Inductor schedules for an H100 that is not there, and how many bytes its kernels move: bytes.py ARCH SIZE BATCH GROUPS VIEWS 0; TOP=20 lists the largest."""
"""Inductor's graphs of a step for a GPU that is not there: lowered and scheduled, not compiled."""
import sys, torch, contextlib, types
from unittest import mock
from torch._subclasses.fake_tensor import FakeTensorMode
import torch._inductor.runtime.hints as hints
from torch._inductor import config as ic
arch, size, batch, groups, views = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
if len(sys.argv) > 6: ic.triton.mix_order_reduction = sys.argv[6] == "1"
from reco_fast.method.model import build_encoder, channels_last
from reco_fast.method.passes import use_groups
from reco_fast.settings.config import ModelConfig
PROPS = hints.DeviceProperties(type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32)
import os
for kv in os.environ.get("IC","").split():
    k, v = kv.split("="); o = ic
    for part in k.split(".")[:-1]: o = getattr(o, part)
    setattr(o, k.split(".")[-1], eval(v))
enc = build_encoder(ModelConfig(arch=arch), size)
if groups * views > 1: use_groups(enc, groups, views)
fake = FakeTensorMode(allow_non_fake_inputs=True)
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
import torch._inductor.compile_fx as cfx
done = []

def to_cuda(t):
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda:0") if isinstance(t, torch.Tensor) else t
def inner(gm, example_inputs, is_backward=False, **kw):
    for node in gm.graph.nodes:
        node.kwargs = {k: (torch.device("cuda:0") if k == "device" else v) for k, v in node.kwargs.items()}
        node.args = torch.fx.node.map_aggregate(node.args, lambda v: torch.device("cuda:0") if isinstance(v, torch.device) else v)
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    with fake, torch.no_grad():
        inputs = [to_cuda(t) for t in example_inputs]
        FakeTensorProp(gm, fake).propagate_dont_convert_inputs(*inputs)
    print("graph", len(gm.graph.nodes), is_backward, flush=True)
    g = GraphLowering(gm, example_inputs=inputs, shape_env=None, is_backward=is_backward)
    from torch._inductor.debug import DebugContext
    with V.set_graph_handler(g), V.set_fake_mode(fake), V.set_debug_handler(DebugContext()), torch.no_grad():
        g.run(*inputs)
        g._update_scheduler()
        import collections, math
        tri = ext = 0; rows = []
        def size(name):
            try: return g.sizevars.size_hint(g.get_numel(name) if name in g.graph_inputs or name in g.name_to_buffer or name in g.constants else 0) * g.get_dtype(name).itemsize
            except Exception as e:
                try:
                    lay = g.name_to_buffer[name].get_layout() if name in g.name_to_buffer else g.graph_inputs[name].get_layout()
                    return math.prod(int(x) for x in lay.size) * lay.dtype.itemsize
                except Exception: return 0
        for n in g.scheduler.nodes:
            own = {b.get_name() for b in n.get_outputs()}
            names = {x.get_name() for x in n.get_nodes()}
            reads = {d.name for d in n.read_writes.reads} - own
            r = sum(map(size, reads))
            w = 0
            for b in n.get_outputs():
                users = {u.node.get_name() for u in b.users if u.node is not None and hasattr(u.node, "get_name")}
                if users - names or not users: w += size(b.get_name())
            e = type(n).__name__ in ("ExternKernelSchedulerNode", "NopKernelSchedulerNode")
            if e: ext += r + w
            else: tri += r + w
            def dty(nm):
                try: return g.get_dtype(nm)
                except Exception: return "?"
            dt = lambda nm: (str(dty(nm)).replace("torch.", "") + ("" if size(nm) < 1e6 else ":%.2fG" % (size(nm)/1e9)))
            outs = [b.get_name() for b in n.get_outputs() if ({u.node.get_name() for u in b.users if u.node is not None and hasattr(u.node, "get_name")} - names) or not b.users]
            origin = sorted({str(o.target).split(".")[0 if isinstance(o.target, str) else -2] + "." + str(o.target).split(".")[-1] if "." in str(o.target) else str(o.target) for x in n.get_nodes() if x.node is not None for o in x.node.origins})
            rows.append((r + w, e, len(n.get_nodes()), "red" if any(getattr(x, "is_reduction", lambda: False)() for x in n.get_nodes()) else "poi", sorted(map(dt, reads), key=lambda q: ":" not in q)[:7], sorted(map(dt, outs), key=lambda q: ":" not in q)[:5], [o.split(".")[-2] if o.split(".")[-1] in ("default","dim_IntList","Tensor","Scalar","correction","dtype","int") else o for o in origin][:12]))
    print("nodes", len(g.scheduler.nodes), "triton GB %.2f" % (tri/1e9), "extern GB %.2f" % (ext/1e9), "kernels", sum(not r[1] for r in rows), "big", sum(r[0] > 5e7 and not r[1] for r in rows), "reductions GB %.2f" % (sum(r[0] for r in rows if r[3] == "red" and not r[1])/1e9), flush=True); done.append(g)
    import os
    def isl(st, sz): return len(sz) == 4 and (st[1] == 1 or sz[1] == 1)
    for n in g.scheduler.nodes:
        if type(n).__name__ == "ExternKernelSchedulerNode" and os.environ.get("EXT"):
            node = n.node
            desc = []
            for i in getattr(node, "inputs", []):
                try:
                    sz = [int(v) for v in i.get_size()]; st = [int(v) for v in i.get_stride()]
                    if math.prod(sz) > 1e6: desc.append((sz, "cl" if isl(st, sz) else st, str(i.get_dtype())[6:]))
                except Exception as e: desc.append(repr(e)[:30])
            if any(d[1] != "cl" for d in desc if isinstance(d, tuple)): print("graph ext", type(node).__name__, getattr(node, "python_kernel_name", ""), desc)
    for r in sorted((r for r in rows if not r[1]), key=lambda r: -r[0])[:int(os.environ.get("TOP", "0"))]: print("graph| %.2f GB" % (r[0]/1e9), *r[2:])
class Stop(Exception): pass
patches = [mock.patch("torch.compiler.is_compiling", lambda: True), mock.patch("torch.cuda.get_rng_state", lambda *a: torch.zeros(16, dtype=torch.uint8)), mock.patch("torch.cuda.set_rng_state", lambda *a: None), mock.patch("torch._dynamo.utils.preserve_rng_state", contextlib.nullcontext), mock.patch("torch._functorch.aot_autograd.preserve_rng_state", contextlib.nullcontext), mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *a: None), mock.patch("torch.cuda._lazy_init", lambda *a: None), mock.patch("torch.cuda.is_available", lambda: True), mock.patch("torch.cuda.device_count", lambda: 1), mock.patch("torch.cuda.current_device", lambda: 0),
  mock.patch("torch.cuda.get_device_capability", lambda *a: (9, 0)), mock.patch.object(hints.DeviceProperties, "create", lambda d: PROPS),
  mock.patch("torch.cuda.get_device_properties", lambda *a: types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, warp_size=32, total_memory=80*2**30, gcnArchName="", name="H100", shared_memory_per_block_optin=232448, L2_cache_size=60*2**20)),
  mock.patch("torch._C._conv_determine_backend_memory_format", lambda *a, **k: torch.channels_last),
  mock.patch("torch._inductor.utils.has_triton", lambda *a: True, create=True)]
with contextlib.ExitStack() as s:
    for p in patches: s.enter_context(p)
    with fake:
        enc = fake_enc = enc
        def tofake(t):
            f = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
            return f
        for m in enc.modules():
            for n, p in list(m._parameters.items()):
                if p is not None:
                    q = p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p
                    m._parameters[n] = torch.nn.Parameter(tofake(q))
            for n, b in list(m._buffers.items()):
                if b is not None: m._buffers[n] = tofake(b)
        x = torch.empty((batch * views, 3, size, size), device="cpu", dtype=torch.half).to(memory_format=torch.channels_last)
        for n in enc.modules():
            if hasattr(n, "num_batches_tracked"): n.num_batches_tracked = n.running_mean = n.running_var = None
        params = {**dict(enc.named_parameters()), **dict(enc.named_buffers())}
        def f(params, x):
            with torch.autocast("cpu", torch.bfloat16):
                return (torch.func.functional_call(enc, params, (x,)),)
        flat = list(params); 
        def g(*args): 
            with torch.autocast("cpu", torch.bfloat16): return (torch.func.functional_call(enc, dict(zip(flat, args[:-1])), (args[-1],)),)
        from torch._functorch.aot_autograd import aot_function
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.fx_passes import joint_graph, post_grad
        def partition(gm, inputs, **kw):
            pass
            return min_cut_rematerialization_partition(gm, inputs, compiler="inductor", **{k: v for k, v in kw.items()})
        from torch._functorch.aot_autograd import aot_export_joint_simple
        joint = aot_export_joint_simple(g, (*params.values(), x), trace_joint=True, num_params_buffers=0, decompositions=select_decomp_table())
        fw, bw = min_cut_rematerialization_partition(joint, None, num_fwd_outputs=1, compiler="inductor")
        for gm, back in ((fw, False), (bw, True)):
            inner(gm, [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"], is_backward=back)
print("compiled graphs", len(done))
