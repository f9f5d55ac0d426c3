import os,sys,collections
os.environ.update(INIT=sys.argv[1],THREADS='1',NU='0')
WID=float(os.environ.get('WID','1'))
src=open('tr_y2.py').read().split("gen=torch.Generator()")[0]
src=src.replace("STEPS,LR=sys.argv[1],int(sys.argv[2]),float(sys.argv[3])","STEPS,LR='x',1,1e-4")
exec(src)
from dataclasses import replace
import re
for cat in sys.argv[2:]:
    col=_r(FLUENT,categories={cat:1.0})
    N=96
    ss=[training_scene(999,k,NN,collection=col,size=(256,256)) if os.environ.get('HO','0')=='0' else sample_scene(np.random.default_rng((9,k)),NN,held_out=True,collection=col,size=(256,256)) for k in range(N)]
    x=pad(torch.from_numpy(np.stack([semantic_map(s,16) for s in ss])).permute(0,3,1,2));tk=tokens_of([s.caption for s in ss])
    eps=torch.randn(x.shape,generator=torch.Generator().manual_seed(3))
    for q in nets.values(): q.resize((16,16))
    with torch.no_grad(): v=torch.cat([run(WID,P,eps[i:i+32],torch.ones(min(32,N-i)),tk[0][i:i+32],tk[1][i:i+32]) for i in range(0,N,32)])
    x0=eps-v
    a,ac,ap=things_at28(x0[:,K:].permute(0,2,3,1).numpy());b,bc,bp=things_at28(x[:,K:].permute(0,2,3,1).numpy())
    pl=np.all([p==q for p,q in zip(ap,bp)],0)
    ok=[];why=collections.Counter();rel=collections.defaultdict(list)
    for k,s in enumerate(ss):
        ii=b[k]>0
        n=((a[k]==b[k])[ii]).mean();p=(pl[k][ii]).mean();c=((ac[k]==bc[k])[ii]).mean()
        good=min(n,p,c)>.8;ok.append(good)
        why[('noun ' if n<.8 else '')+('place ' if p<.8 else '')+('color' if c<.8 else '')]+=1
        r=next((w for w in ('left','right','above','below','over','under','top','beneath') if w in s.caption),'-');rel[r].append(good)
        if not good and len(sys.argv)==3: print(s.caption,'|',round(n,2),round(p,2),round(c,2),'|',[ ((FLUENT.nouns[i-1].name if i<=150 else str(i)),int(m)) for i,m in zip(*np.unique(a[k][a[k]>0],return_counts=True)) if m>3])
    print(cat,np.mean(ok),dict(why),{r:(round(np.mean(v),2),len(v)) for r,v in rel.items()},flush=True)
