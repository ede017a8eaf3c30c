import sys, dataclasses
area, strength = float(sys.argv.pop(1)), float(sys.argv.pop(1))
import reco_fast.data as data
original = data.reco_recipe
def recipe(size):
    r = original(size)
    def change(v):
        v = dataclasses.replace(v, area=(area, 1.0))
        if v.jitter_probability:
            v = dataclasses.replace(v, brightness=v.brightness*strength, contrast=v.contrast*strength, saturation=v.saturation*strength, hue=v.hue*strength)
        return v
    return dataclasses.replace(r, views=tuple(map(change, r.views)))
data.reco_recipe = recipe
from reco_fast import train
train.main()
