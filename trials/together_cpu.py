"""Compiled on a CPU: both views in one pass against a pass each, in turns in one process."""
import sys,time,statistics,torch
import reco_fast.state as S
from reco_fast.config import *
from reco_fast.step import *
torch.set_num_threads(2)
CPU=torch.device('cpu'); kn=sys.argv[1]; rows=64
c=Config(data=DataConfig(image_size=32),model=ModelConfig(arch='resnet18',bank_size=4096,key_norm=kn),train=TrainConfig(batch_size=rows,precision='bf16',compile=True))
one=S.build_state(c,CPU)
rs,rt=S.running_student,S.running_teacher
S.running_student=lambda a,b,v: rs(a,b,1); S.running_teacher=lambda a,b,p,s,v: rt(a,b,p,s,1)
two=S.build_state(c,CPU)
assert one.run_student.together and not two.run_student.together
v=tuple(torch.randn(rows,3,32,32).contiguous(memory_format=torch.channels_last) for _ in range(3))
def st(s): 
    t=time.perf_counter(); train_step(s,c,v,draw(0,rows,c,CPU),scheduled(0,10,c)); return time.perf_counter()-t
for s in (one,two): st(s);st(s)
r=[]
for i in range(21):
    a,b=(st(one),st(two)) if i%2 else reversed((st(two),st(one)))
    r.append((a,b))
q=sorted(b/a for a,b in r)
print(kn,'each/together',round(statistics.median(q),3),'quartiles',round(q[5],3),round(q[15],3),'together s',statistics.median(a for a,_ in r))
