import sys;sys.path[:0]=['.']
import mlx_snapgen,numpy as np,mlx.core as mx,time
from mlx_snapgen.semantics import *
from mlx_snapgen.networks.autoencoders.semantics import agreed,as_codes,nearest
cfg=SemanticConfig(150,(2,4,6,8,10,12,14,16))
d=np.load(sys.argv[1]);o,s=mx.array(d['o']),mx.array(d['s'])
t=time.time();a=agreed(o,cfg);mx.eval(a);print('seconds',time.time()-t)
T=as_codes(s,cfg)
x=agreed(s,cfg);print("exact maps kept:",float((mx.abs(x-T).max(-1)<.01).mean()))
for name,q in (('plain',o),('agreed',a)):
    E=np.array(q if q.shape[-1]==28 else as_codes(q,cfg));Z=np.array(T);ii=np.abs(Z[...,:8]).max(-1)>0
    out=[]
    for n,b in (('thing',THING),('color',COLOR),('ground',GROUND),('col',COLUMN),('row',ROW),('side',SIDE),('all',slice(0,28))):
        ok=abs(E[...,b]-Z[...,b]).max(-1)<.1;out.append(f'{n} {ok[ii].mean():.3f}/{ok[~ii].mean():.3f}')
    print(name,*out)
Z=np.array(as_codes(x,cfg));bad=np.abs(Z-np.array(T)).max(-1)>.01
for i in np.nonzero(bad.any((1,2)))[0][:3]:
    print(i,bad[i].sum());n=np.array(nearest(s[i,...,THING],150)[0]);k=np.array(mx.argmin(mx.abs(s[i,...,18:19]-mx.log2(mx.array(cfg.sides)/6)),-1));it=np.array(nearest(s[i,...,THING],150)[1])
    print(np.where(it,n,-1));print(bad[i].astype(int))
