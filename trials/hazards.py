"""Every path through the SASS of a kernel: does any instruction touch the registers of an unfinished HGMMA (read or
write its accumulator; write its operand), or another HGMMA overlap them? Unfinished: its group (to gsb0) has not been
waited for by WARPGROUP.DEPBAR. States (place, groups in flight) are finite, so all are visited."""
import re, sys
def load(path):
    out=[]
    for l in open(path):
        m=re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);",l)
        if m: out.append((int(m[1],16),m[2].strip()))
    return out
def decode(a,t):
    u=re.sub(r"^@!?\S+\s+","",t); guard=u!=t and not t.startswith("@PT"); parts=u.split(None,1); op=parts[0]; rest=parts[1] if len(parts)>1 else ""
    ops=[x.strip() for x in rest.split(",")]
    if op.startswith("HGMMA"):
        n=int(re.search(r"64x(\d+)x16",op)[1]); d=int(re.match(r"R(\d+)",ops[0])[1])
        m=re.match(r"R(\d+)",ops[1]); A=frozenset(range(int(m[1]),int(m[1])+4)) if m else frozenset()
        return ("mma",frozenset(range(d,d+n//2)),A,"gsb0" in rest)
    m=re.search(r"WARPGROUP.DEPBAR.LE gsb0, (0x\d+)",u)
    if m: return ("wait",int(m[1],16))
    if op.startswith("BRA"):
        return ("bra",int(re.search(r"0x[0-9a-f]+",rest)[0],16),guard or "P" in ops[0])
    if op.startswith("BRX"): return ("brx",)
    if op.startswith("EXIT"): return ("exit",guard)
    if op.startswith(("WARPGROUP","BAR","NOP","USETMAXREG")): return ("none",)
    no=op.startswith(("ST","ISETP","FSETP","R2UR","SYNCS","UTMALDG","RED","LOP3.LUT P"))or not re.match(r"R\d+",ops[0] or "")
    w=set()
    if not no:
        d=int(re.match(r"R(\d+)",ops[0])[1])
        k=4 if ".128" in op else 2 if (op.startswith("CS2R") and ".32" not in op) or ".64" in op or "WIDE" in op else 1
        w=set(range(d,d+k))
    r=set()
    for x in ops[0 if no else 1:]:
        for m in re.finditer(r"\bR(\d+)(\.64)?\b",x): r|={int(m[1])}|({int(m[1])+1} if m[2] else set())
    if op.startswith("STS.128") or op.startswith("STG.E.128"):
        for m in re.finditer(r"\bR(\d+)\b",ops[-1]): r|=set(range(int(m[1]),int(m[1])+4))
    return ("do",frozenset(w),frozenset(r))
def main(path):
    ins=load(path); at={a:i for i,(a,_) in enumerate(ins)}; dec=[decode(a,t) for a,t in ins]
    mma={ins[i][0]:d for i,d in enumerate(dec) if d[0]=="mma"}
    jumps=set()
    for i,(a,t) in enumerate(ins):
        if dec[i][0]=="brx":
            # targets of the indirect branch: what follows an unconditional branch, exit or warp return
            jumps|={ins[j+1][0] for j in range(len(ins)-1) if dec[j][0]=="bra" and not dec[j][2]}
    work=[(ins[0][0],(),())]; seen=set(); bad=set(); most=0
    while work:
        a,groups,cur=work.pop()
        if (a,groups,cur) in seen: continue
        seen.add((a,groups,cur)); i=at[a]
        while True:
            a,t=ins[i]; d=dec[i]; k=d[0]
            if k=="mma":
                for g in groups+(cur,):
                    for a2 in g:
                        _,D2,A2,_=mma[a2]
                        if (d[1]&D2 and d[1]!=D2) or d[1]&A2 or d[2]&D2: bad.add((hex(a),t,"overlaps",hex(a2)))
                if a not in cur: cur=cur+(a,)
                if d[3]: groups=groups+(cur,); cur=(); most=max(most,len(groups))
                if len(groups)>6: bad.add((hex(a),"endless groups")); break
            elif k=="wait": groups=groups[len(groups)-d[1]:] if d[1] and len(groups)>d[1] else (groups if d[1] else ())
            elif k=="do":
                for g in groups+(cur,):
                    for a2 in g:
                        _,D2,A2,_=mma[a2]
                        if d[1]&A2: bad.add((hex(a),t,"writes an operand of",hex(a2)))
                        if (d[1]|d[2])&D2: bad.add((hex(a),t,"touches the accumulator of",hex(a2)))
            elif k=="bra":
                if d[1] in at: work.append((d[1],groups,cur))
                if not d[2]: break
                work.append((ins[i+1][0],groups,cur)); break
            elif k=="brx":
                work+=[(x,groups,cur) for x in jumps]; break
            elif k=="exit" and not d[1]: break
            i+=1
            if i>=len(ins): break
    reached={a for a,_,_ in seen}
    print(path.split('/')[-1],"states",len(seen),"most groups in flight",most,"hazards",len(bad))
    for b in sorted(bad)[:6]: print("   ",b)
for p in sys.argv[1:]: main(p)
