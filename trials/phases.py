"""The barriers of both kernels under random schedules: every tile is read only when whole and never overwritten while
it may still be read; nothing hangs. mbarrier: phase parity, count, bytes; copies and products finish late, at random."""
import random
class Bar:
    def __init__(s,count): s.count=s.left=count; s.tx=0; s.phase=0
    def check(s):
        if s.left==0 and s.tx==0: s.phase+=1; s.left=s.count
    def arrive(s,tx=0): s.tx+=tx; s.left-=1; assert s.left>=0; s.check()
    def complete(s,tx): s.tx-=tx; s.check()
    def passed(s,parity): return (s.phase-1)&1==parity
def run(groups,S,specialised,order,warps,rng):
    full=[Bar(1) for _ in range(S)]; empty=[Bar(2) for _ in range(S)]
    slot=[None]*S; copies=[]; readers=[set() for _ in range(S)]; done=[]
    def fetch(g):
        if g>=groups: return
        full[g%S].arrive(2); copies.append((g,0)); copies.append((g,1))
        assert not readers[g%S],("overwritten while read",g,readers[g%S])
        slot[g%S]=[None,None]
    # a consumer warp: generator yielding conditions to wait for
    class Cta: pass
    bars={}
    def barrier(key,n):  # a barrier of n warps, each time a new one
        k=bars.setdefault(key,[0,0]); gen=k[1]; k[0]+=1
        if k[0]==n: k[0]=0; k[1]+=1
        return lambda: bars[key][1]>gen
    def warp(w,team,size,leader):
        flight=[]  # of (group, half, token)
        def issue(g,h):
            assert slot[g%S] is not None and slot[g%S][h]==(g,h),("read before full",g,h,slot[g%S])
            t=(w,len(flight),g,h,rng.random()); readers[g%S].add(t); flight.append((g,t))
        def retire(keep):
            while len(flight)>keep:
                g,t=flight.pop(0); readers[g%S].discard(t)
        def free(g):
            if specialised:
                yield barrier(team,size)
                if leader and g>0: empty[(g+S-1)%S].arrive()
                yield barrier(team,size)
            else:
                yield barrier(team,size)
                if leader: fetch(g+S-1)
                yield barrier(team,size)
        yield lambda: full[0].passed(0)
        if order=="sync":
            for g in range(groups):
                yield lambda g=g: full[g%S].passed((g//S)&1)
                for h in (0,1):
                    issue(g,h); yield None; retire(0); issue(g,h); yield None; retire(0)
                    if h==0: yield from free(g)
        else:
            def step(a,b):
                if order=="ahead":
                    issue(*b); yield None; issue(*a); yield None; retire(1)
                else:
                    issue(*b); issue(*a); yield None; retire(1); yield None; retire(0)
            issue(0,0); yield None; retire(0)
            for g in range(groups-1):
                yield from step((g,0),(g,1)); yield from free(g)
                yield lambda g=g: full[(g+1)%S].passed(((g+1)//S)&1)
                yield from step((g,1),(g+1,0))
            g=groups-1
            yield from step((g,0),(g,1)); issue(g,1); retire(0)
    def producer():
        for g in range(groups):
            yield lambda g=g: empty[g%S].passed(((g//S)&1)^1)
            fetch(g)
    actors=[]
    if specialised:
        for team in (0,1): actors+=[warp(team*4+i,team,4,i==0) for i in range(4)]
        actors.append(producer())
    else:
        for i in range(S-1): fetch(i)
        actors=[warp(i,0,warps,i==0) for i in range(warps)]
    state={a:next(a,"end") for a in actors}; stuck=0
    while True:
        live=[a for a in actors if state[a]!="end"]
        if not live and not copies: break
        moves=[a for a in live if state[a] is None or state[a]()]+["copy"]*len(copies)
        assert moves,"hang"
        m=rng.choice(moves)
        if m=="copy":
            g,h=copies.pop(rng.randrange(len(copies))); slot[g%S][h]=(g,h); full[g%S].complete(1)
        else: state[m]=next(m,"end")
def main():
    n=0; rng=random.Random(0)
    for groups in (1,2,3,4,5,8,11,14):
        for S in (3,4,5):
            for spec,order,warps in ((0,"sync",4),(0,"ahead",4),(0,"ahead",8),(0,"late",8),(1,"late",4)):
                for _ in range(12): run(groups,S,bool(spec),order,warps,rng); n+=1
    print(n,"schedules, no hang, no tile read early or overwritten")
main()
