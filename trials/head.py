"""Our trainer with a linear projector (HEAD=linear)."""
import os
from torch import nn
from reco_fast.method import model, state
if os.environ.get("HEAD") == "linear":
    build = model.build_encoder
    def built(config, size):
        e = build(config, size); e.projector = nn.Linear(e.feature_dim, config.projection_dim); return e
    state.build_encoder = built
from reco_fast import train
train.main()
