"""python pool.py N SEED OUT [KIND]: packed scenes, encoded by the 32-channel encoder."""
import sys,time,numpy as np,os
sys.path.insert(0,'work/int')
import mlx.core as mx
from dataclasses import replace
from pathlib import Path
from train.data.stickers.captions import Placed,Scene
from train.data.stickers.vocabulary import collection_in
from train.data.stickers.scenes import training_scene
from train.data.stickers.semantics import *
from train.data.stickers.render import render
from mlx_snapgen.pictures import from_uint8
N,SEED,OUT=int(sys.argv[1]),int(sys.argv[2]),sys.argv[3];KIND=sys.argv[4] if len(sys.argv)>4 else 'packed'
coll=collection_in(Path('fluent/package/assets'));nouns=coll.nouns[:150];colors=list(coll.colors)
grounds=[g for g in coll.backgrounds if g!='transparent']
import torch;torch.set_num_threads(1);sys.path.insert(0,'work');sys.path.insert(0,'work/int');import ae as AE;enc=AE.Encoder(*AE.load('start')).requires_grad_(False)
rng=np.random.default_rng((77,SEED))
SIZES=np.array([256,224,192,160,128,96,64,32]);
def packed():
    size=(256,256);occ=np.zeros((16,16),bool);placed=[]
    g='transparent' if KIND=='own' or rng.random()<.75 else grounds[rng.integers(len(grounds))]
    first=True
    for _ in range(40):
        # first thing: any size, by area needs
        p=np.array([.30,.22,.16,.12,.08,.06,.04,.02]) if first else np.array([0,0,.05,.1,.2,.25,.25,.15])
        s=int(rng.choice(SIZES,p=p/p.sum()));m=s//16
        y,x=rng.integers(0,16-m+1,2)
        if occ[y:y+m,x:x+m].any(): continue
        first=False
        n=(coll.nouns[150+rng.integers(50)] if KIND=='mixed' and rng.random()<.35 else nouns[rng.integers(150)]);c=None
        if KIND!='own' and n.recolor and rng.random()<.6: c=colors[rng.integers(len(colors))]
        if g!='transparent' and g in (n.lost_on if c is None else coll.color_lost_on[c]): continue
        occ[y:y+m,x:x+m]=True;placed.append(Placed(n,c,s,int(x*16),int(y*16),None))
    return Scene('mixed',tuple(placed),g,'',None,True,coll,size)
lat,sem=[],[];t0=time.time();buf=[]
for k in range(N):
    s=packed() if KIND=='packed' else training_scene(9000+SEED,k,150,collection=coll,size=(256,256))
    buf.append(render(s));sm=semantic_map(s,16)
    for p in s.placed:
        if coll.nouns.index(p.noun)>=150: sm[p.y//16:(p.y+p.size_px)//16,p.x//16:(p.x+p.size_px)//16]=0
    sem.append(sm.astype(np.float16))
    if len(buf)==16 or k==N-1:
        z=enc(AE.pics(np.stack(buf)));lat.append(z.permute(0,2,3,1).numpy().astype(np.float16));buf=[]
    if k%320==319: print(k+1,round(time.time()-t0,1),flush=True)
np.savez(OUT,lat=np.concatenate(lat),sem=np.stack(sem))
