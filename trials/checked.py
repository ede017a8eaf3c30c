"""The trainer; at the steps CHECK=a,b it makes the step again in float32 with neither compiler nor graph nor kernel and says how far it was off."""
import dataclasses, json, os, sys, time
import numpy as np, torch
from reco_fast import train as t
from reco_fast.method import state as st
AT = {int(x) for x in os.environ.get("CHECK", "").split(",") if x}
OUT = os.environ.get("CHECK_OUT", "/tmp/check")
real = t.train_step
def parts(state):
    o = {"student": dict(state.student.named_parameters()), "averages": {k: v for k, v in state.student.named_buffers() if v.is_floating_point()},
         "teacher": dict(state.teacher.named_parameters()), "bank": {"keys": state.bank.keys, "weak_keys": state.bank.weak_keys, "position": state.bank.position}}
    names = {id(p): n for n, p in state.student.named_parameters()}
    o["momentum"] = {names[id(p)]: s["momentum_buffer"] for p, s in state.optimizer.state.items() if s.get("momentum_buffer") is not None}
    return o
def snapshot(state): return {k: {n: v.detach().clone() for n, v in d.items()} for k, d in parts(state).items()}
def off(a, b): return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
def checked(state, config, views, draws, schedule):
    if state.step not in AT: return real(state, config, views, draws, schedule)
    began, number, seen = time.time(), state.step, tuple(v.detach().clone() for v in views)
    before = snapshot(state)
    result = real(state, config, views, draws, schedule)
    kept, after = result.clone(), snapshot(state)
    tf = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    say = {"step": number, "captured": state.graphed is not None}
    rng = torch.get_rng_state()
    for name in ("fp32",):
        c = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=False, cuda_graph=False, precision=name), loss=dataclasses.replace(config.loss, impl="torch"))
        ref = st.build_state(c, state.device)
        with torch.no_grad():
            for k, d in parts(ref).items():
                for n, v in d.items(): v.copy_(before[k][n])
            for n, p in ref.student.named_parameters():
                if n in before["momentum"]: ref.optimizer.state[p]["momentum_buffer"] = before["momentum"][n].clone()
        ref.update_teacher.refresh(); ref.step = number
        theirs = real(ref, c, tuple(v.float() for v in seen), draws, schedule)
        want = snapshot(ref)
        r = {"metrics": [[round(float(x), 5) for x in m] for m in (kept, theirs)]}
        for k in after:
            da = {n: after[k][n].double() - before[k][n].double() for n in after[k]}; db = {n: want[k][n].double() - before[k][n].double() for n in after[k]}
            whole = [torch.cat([d[n].flatten() for n in sorted(d)]) for d in (da, db)]
            r[k] = {"change": off(*whole), "size": float(whole[1].norm()), "worst": sorted(((round(off(da[n], db[n]), 4), n) for n in da), reverse=True)[:4]}
        r["momentum itself"] = off(torch.cat([after["momentum"][n].flatten() for n in sorted(after["momentum"])]), torch.cat([want["momentum"][n].flatten() for n in sorted(want["momentum"])]))
        grads = []  # momentum after − 0.9 before = gradient with decay
        for w in (after, want): grads.append({n: w["momentum"][n].double() - config.optim.momentum * before["momentum"][n].double() for n in w["momentum"]})
        whole = [torch.cat([g[n].flatten() for n in sorted(g)]) for g in grads]
        r["gradient"] = {"off": off(*whole), "cosine": float(torch.nn.functional.cosine_similarity(whole[0], whole[1], 0)), "worst": sorted(((round(off(grads[0][n], grads[1][n]), 4), n) for n in grads[0]), reverse=True)[:6]}
        say[name] = r
        del ref
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf
    torch.set_rng_state(rng)
    say["seconds"] = round(time.time() - began, 1)
    np.savez(f"{OUT}-{number}.npz", **{f"view{i}": v[:64].half().cpu().numpy() for i, v in enumerate(seen)})
    json.dump(say, open(f"{OUT}-{number}.json", "w"), indent=1)
    print("CHECK", json.dumps(say)[:1500], flush=True)
    if state.device.type == "cuda": torch.cuda.empty_cache()
    return result
t.train_step = checked
if __name__ == "__main__": t.main()
