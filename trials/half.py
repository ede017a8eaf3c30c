"""The student's weights of a run in half precision: half.py RUN FILE"""
import sys, glob, torch
from safetensors.torch import load_file, save_file
w = load_file(sorted(glob.glob(sys.argv[1] + "/checkpoints/*.safetensors"))[-1])
s = {k: (v.half() if v.is_floating_point() and "running" not in k else v).contiguous() for k, v in w.items() if k.startswith("student")}
save_file(s, sys.argv[2]); print(len(s), sum(v.numel() for v in s.values()))
