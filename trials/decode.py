"""CIFAR-10's JPEG files as arrays: decode.py FOLDER OUT.npz [EACH]"""
import sys, numpy as np
from multiprocessing import Pool
from pathlib import Path
from PIL import Image
def one(path): return np.asarray(Image.open(path).convert("RGB"))
if __name__ == "__main__":
    root, each = Path(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else None
    out = {}
    with Pool() as pool:
        for split, key in (("train", ""), ("test", "t")):
            files = [(f, c) for c, d in enumerate(sorted((root / split).iterdir())) for f in sorted(d.iterdir())[:each]]
            out["x" + key] = np.stack(pool.map(one, [f for f, _ in files], chunksize=500)); out["y" + key] = np.array([c for _, c in files])
    np.savez(sys.argv[2], **out); print({k: v.shape for k, v in out.items()})
