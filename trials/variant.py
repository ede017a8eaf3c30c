"""The trainer with another recipe: AREA=0.08 crops from there up; SPLIT=8 groups of the student's batch norms too."""
import dataclasses, os
import reco_fast.data as data
from reco_fast.method import passes, state
area, split = float(os.environ.get("AREA", "0.2")), int(os.environ.get("SPLIT", "0"))
recipe = data.reco_recipe
def changed(size):
    r = recipe(size)
    return dataclasses.replace(r, views=tuple(dataclasses.replace(v, area=(area, 1.0)) for v in r.views))
data.reco_recipe = changed
running = passes.running_student
def student(module, size, views):
    group = passes.use_groups
    if split:
        passes.use_groups = lambda m, groups, views=1: group(m, split, views)
    try:
        found = running(module, size, views)
    finally:
        passes.use_groups = group
    if split:
        assert found.together or views == 1
        if views == 1:
            group(found.module, split, views)
        print("student in", split, "groups of", views, "views", {(n.groups, n.views) for n in found.module.modules() if hasattr(n, "groups") and hasattr(n, "views")}, flush=True)
    return found
state.running_student = student
from reco_fast import train
if __name__ == "__main__":
    train.main()
